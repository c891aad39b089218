"""What the pages name exists: policies, tasks, settings, files; and what exists is named where all of a kind are."""

import re
import tomllib

import pytest
import yaml

from eval.cells import TASKS
from recycled_jax.cli import COMMANDS
from recycled_jax.policies import POLICIES
from recycled_jax.prefill.registry import PREFILLS
from tests.docs.command_lines import accept
from tests.docs.pages import PAGES, ROOT, blocks, name, spans, tables

YAML = [code for page in PAGES for code in blocks(page, "yaml", "yml")]
READERS = (
    ["python", "-m", "train"],
    ["python", "-m", "eval"],
    ["python", "-m", "eval", "bench"],
    ["recycled", "generate"],
)
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "build", "demo_out"}


@pytest.mark.parametrize("code", YAML, ids=str)
def test_yaml_is_a_config_of_one_of_the_programs(code, tmp_path):
    (tmp_path / "config.yaml").write_text(code.text)
    assert isinstance(yaml.safe_load(code.text), dict)
    refusals = []
    for reader in READERS:
        try:
            accept([*reader, "--config", str(tmp_path / "config.yaml")], tmp_path)
            return
        except AssertionError as refusal:
            refusals.append(str(refusal))
    pytest.fail("\n".join(refusals))


def test_yaml_with_a_misspelled_key_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("stagess: []\n")
    for reader in READERS:
        with pytest.raises(AssertionError, match="stagess"):
            accept([*reader, "--config", str(tmp_path / "config.yaml")], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_in_the_text_exist(page):
    paths = [code for code in spans(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", code.text)]
    ours = [code for code in paths if code.text.split("/")[0] in FOLDERS]
    assert [str(code) + " " + code.text for code in ours if not (ROOT / code.text).exists()] == []


def test_the_page_of_policies_names_every_one_and_no_other():
    [table] = [found for found in tables(ROOT / "docs" / "policies.md") if found[0] == ["a policy that", "names"]]
    *families, ways_to_read = [re.findall(r"`([^`]+)`", row[1]) for row in table[1:]]
    assert ways_to_read == list(PREFILLS)
    assert sorted(policy for row in families for policy in row) == sorted(POLICIES)


def test_readme_names_policies_that_exist_and_how_many():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [(count, listed)] = re.findall(
        r"^- \[(\d+) policies\]\(docs/policies\.md\)(.*?)(?=^- )", readme, re.DOTALL | re.MULTILINE
    )
    assert int(count) == len(POLICIES)
    named = re.findall(r"`([^`]+)`", listed)
    assert named and set(named) <= set(POLICIES)


def test_the_maps_show_what_is_there():
    """Folders in the README; in CONTRIBUTING.md the modules of each package, whose folders are all named."""
    [shown] = re.findall(r"## The map\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    folders = re.findall(r"(\w+)/ ", shown)
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    packages = [found for found in tables(ROOT / "CONTRIBUTING.md") if found[0][0].endswith("/`")]
    for (package, _), *rows in packages:
        folder = ROOT / package.strip("`/")
        assert folder.name in folders
        named = {module for row in rows for module in re.findall(r"`([^`]+)`", row[0])}
        there = {path.stem: path.is_dir() for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
        assert named <= set(there), f"{named - set(there)} of {package} do not exist"
        inner = {name for name, is_folder in there.items() if is_folder and name != "__pycache__"}
        assert inner <= named, f"{inner - named} of {package} are not in the map"
    assert len(packages) == 5


def test_evaluation_names_every_task_and_no_other():
    [table] = [found for found in tables(ROOT / "docs" / "evaluation.md") if found[0][0] == "name"]
    named = {word for row in table[1:] for word in _expanded(row[0])}
    assert named == {*TASKS, "perplexity", "ruler"}


def test_readme_or_a_page_names_every_command():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [command for command in COMMANDS if f"recycled {command}" not in text] == []


def test_every_page_is_in_the_site():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = [name(page).removeprefix("docs/") for page in PAGES if ROOT / "docs" in page.parents]
    assert [page for page in docs if f": {page}\n" not in config] == []


def _expanded(cell: str) -> list[str]:
    """The names of a cell; `x_1` … `_3` are three."""
    words = []
    for start, end in re.findall(r"`([^`]+)`(?: … `_(\d)`)?", cell):
        words += [f"{start[:-1]}{number}" for number in range(int(start[-1]), int(end) + 1)] if end else [start]
    return [word for word in words if not word.startswith("_")]


def test_the_citation_file_has_the_paper_of_every_policy_and_no_other():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    numbers = [identifier["value"] for paper in cited for identifier in paper["identifiers"]]
    named = re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "docs" / "policies.md").read_text(encoding="utf-8"))
    assert sorted(numbers) == sorted({f"arXiv:{number}" for number in named})
    assert all(paper["title"] and paper["authors"] and paper["year"] for paper in cited)


def test_the_citation_file_names_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited == project["version"]
    assert f" {cited}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
