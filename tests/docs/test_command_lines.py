"""Every command in the documentation is one that the programs take: command, flags, configs, policies, tasks."""

import re

import pytest

from recycled_jax.cli import COMMANDS
from recycled_jax.policies import POLICIES
from tests.docs.command_lines import accept, flags_of, help_of, read_by_bash
from tests.docs.pages import PAGES, ROOT, blocks, is_command, spans

SHELL = [code for page in PAGES for code in blocks(page, "sh", "bash", "shell", "console")]
IN_THE_TEXT = [code for page in PAGES for code in spans(page)]
WHOLE = [code for code in IN_THE_TEXT if is_command(code.text) and "…" not in code.text]
FRAGMENTS = [code for code in IN_THE_TEXT if code not in WHOLE and re.search(r"(^| )--[a-z]", code.text)]
PROGRAMS = [
    *(["recycled", command] for command in COMMANDS if command != "lm-eval"),
    *(["python", "-m", module] for module in ("eval", "train", "tpu_check", "eval.retrieval", "eval.policies")),
    *(["python", "-m", "eval", command, "run"] for command in ("compare", "report")),
    ["python", "-m", "eval", "bench"],
]


@pytest.fixture
def policy_of_the_page(monkeypatch):
    """Registers what docs/adding_a_policy.md registers, as its commands use it."""
    session = {"POLICIES": dict(POLICIES), "__name__": "session"}
    for code in blocks(ROOT / "docs" / "adding_a_policy.md", "python")[:2]:
        exec(code.text, session)
    for name in set(session["POLICIES"]) - set(POLICIES):
        monkeypatch.setitem(POLICIES, name, session["POLICIES"][name])


@pytest.mark.parametrize("code", SHELL, ids=str)
def test_block_is_taken(code, tmp_path):
    commands = read_by_bash(code.text, tmp_path)
    assert commands
    for argv in commands:
        accept(argv, tmp_path)


@pytest.mark.usefixtures("policy_of_the_page")
@pytest.mark.parametrize("code", WHOLE, ids=str)
def test_command_in_the_text_is_taken(code, tmp_path):
    [argv] = [argv for argv in read_by_bash(code.text, tmp_path) if argv[:2] != ["python", "-c"]]
    accept([*argv, "--help"] if argv in PROGRAMS else argv, tmp_path)  # a program that is named may need arguments


@pytest.fixture(scope="module")
def all_flags(tmp_path_factory) -> set[str]:
    """Those of all programs."""
    folder = tmp_path_factory.mktemp("help")
    return set().union(*(flags_of(help_of(argv, folder)) for argv in PROGRAMS))


@pytest.mark.parametrize("code", FRAGMENTS, ids=str)
def test_flags_in_the_text_exist(code, all_flags, tmp_path):
    if flags_of(code.text) <= all_flags:
        return
    # help does not list the settings of a part that is absent by default, as --distributed.processes
    fragment, refusals = read_by_bash(f"git {code.text}", tmp_path)[0][1:], []
    for program in PROGRAMS:
        try:
            accept([*program, *fragment], tmp_path)
            return
        except AssertionError as refusal:
            refusals.append(str(refusal))
    pytest.fail("\n".join(refusals))


def test_a_renamed_flag_is_noticed(tmp_path):
    for line, said in {
        "recycled generate --promt-file book.txt": "--promt-file is not a flag of this command; did you mean",
        "recycled generate --policy recycled --policy.strid 4": "policy.strid is not a knob of 'recycled'",
        "recycled polices": "'polices' is not a command of recycled",
        "python -m eval --length '[4096]'": "'length' is not a setting",
        "python -m eval --tasks '[singel]'": "task 'singel' does not exist",
        "python -m eval --config configs/eval/gone.yaml": "configs/eval/gone.yaml",
        "python -m train --step 3": "'step' is not a setting",
        "python -m eval.retrieval --policies '[fll]' --out out.json": "policy 'fll' does not exist",
        "make demmo": "demmo",
        "pip install 'recycled-jax[gone]'": "extra 'gone' does not exist",
        "recycled plan --model llama-3.1-8b --topology v6e-0": "v6e-0",
    }.items():
        [argv] = read_by_bash(line, tmp_path)
        with pytest.raises(AssertionError, match=re.escape(said)):
            accept(argv, tmp_path)
