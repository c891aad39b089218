"""The model in the unmodified harness, and its answers against `generate` and the model's own forward pass."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from recycled_jax.commands.lm_eval import run_harness
from recycled_jax.generate import generate
from tests.recycled_jax.tiny import save_tiny

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.tasks import TaskManager

from recycled_jax.lm_eval_plugin.model import RecycledJax

PROMPTS = ["The first of four prompts, ", "and a second, longer one: " * 3, "x", "No. 4: "]
NEW = 12
SPARSE = {"policy": "recycled", "policy.k": 16, "policy.stride": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def dense(folder):
    return RecycledJax(pretrained=folder, policy="full", batch_size=4)


@pytest.fixture(scope="module")
def sparse(folder):
    return RecycledJax(pretrained=folder, batch_size=4, **SPARSE)


def ask(method, *arguments):
    return [Instance(method, {}, each, 0) for each in arguments]


def continue_all(lm, *arguments):
    return lm.generate_until(ask("generate_until", *arguments), disable_tqdm=True)


def greedy(lm, prompts, new=NEW):
    """What `generate` says to token ids, as text."""
    engine = lm._engine
    done = generate(engine.model, engine.params, prompts, policy=engine.policy, max_new_tokens=new, capacity=256)
    return [lm.checkpoint.text.decode(tokens) for tokens in done.tokens]


@functools.partial(jax.jit, static_argnames="model")
def whole(model, params, tokens):
    return jax.nn.log_softmax(model.apply(params, tokens))


def plain(lm, text):
    return lm.tok_encode(text, add_special_tokens=False)


def direct(lm, context, continuation):
    """Log-probability of a continuation and whether it is greedy, from one pass of the whole model."""
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(context) + len(continuation)] = [*context, *continuation]
    log_probs = np.asarray(whole(lm._engine.model, lm._engine.params, tokens))[0]
    rows = log_probs[len(context) - 1 : len(context) + len(continuation) - 1]
    return float(rows[np.arange(len(continuation)), continuation].sum()), list(rows.argmax(-1)) == list(continuation)


@pytest.mark.parametrize("first", ["recycled_jax.lm_eval_plugin.model", "lm_eval.models"])
def test_ours_stands_beside_the_harness_s_own_models(first):
    program = (
        f"import sys, {first}, recycled_jax.lm_eval_plugin.model, lm_eval.models\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        "assert get_model('recycled_jax').__name__ == 'RecycledJax'\n"
        "assert {'hf', 'vllm'} <= set(model_registry.keys())\n"
        "assert 'jax' not in sys.modules, 'import is to be cheap'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scoring", ["decode", "prefill"])
def test_dense_log_likelihoods_are_the_model_s(folder, dense, scoring):
    lm = dense if scoring == "decode" else RecycledJax(pretrained=folder, policy="full", batch_size=4, scoring=scoring)
    first = lm.tok_encode(PROMPTS[0])
    best = jax.device_get(
        generate(lm._engine.model, lm._engine.params, [first], policy=lm._engine.policy, max_new_tokens=5, capacity=256)
    ).tokens[0]
    pairs = [(PROMPTS[0], "yes"), (PROMPTS[1], " and so on, for some time"), ("", "unconditional"), ("x ", "y")]
    rows = []
    for context, continuation in pairs:
        rows.append((lm.tok_encode(context.rstrip()), plain(lm, context[len(context.rstrip()) :] + continuation)))
    expected = [direct(lm, *row) for row in rows]
    found = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-4)
    assert [best_one for _, best_one in found] == [best_one for _, best_one in expected]

    last_wrong = [*best[:-1], (best[-1] + 1) % 256]
    found = lm._loglikelihood_tokens([(("", ""), first, best), (("", ""), first, last_wrong)], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_a_policy_is_scored_by_its_own_steps(dense, sparse):
    pair = (PROMPTS[1], "and a continuation of several tokens")
    (score, _), (of_dense, _) = (lm.loglikelihood(ask("loglikelihood", pair), True)[0] for lm in (sparse, dense))
    assert abs(score - of_dense) > 0.01
    assert sparse.get_model_info()["effective_stride"] is not None


def test_one_token_answers_are_warned_about_once(folder, caplog):
    lm = RecycledJax(pretrained=folder, policy="full", batch_size=4)
    for _ in range(2):
        lm.loglikelihood(ask("loglikelihood", ("a b", "c"), ("a b", "cd")), disable_tqdm=True)
    assert sum("1 of 2 continuations have one token" in message for message in caplog.messages) == 1
    assert lm.get_model_info()["one_token_continuations"] == 2


@pytest.mark.parametrize("scoring", [None, "decode"])
def test_rolling_predicts_every_token_once(folder, scoring):
    lm = RecycledJax(pretrained=folder, policy="full", batch_size=4, max_length=32, scoring=scoring)
    texts = ["z" * 7, "A text of more than two windows, whose last one reaches back into the second.", ""]
    expected = []
    for text in texts:
        tokens = plain(lm, text)
        total = 0.0
        for start in range(0, len(tokens), 32):
            piece = tokens[start : start + 32]
            if start == 0:
                context = [lm.prefix_token_id]
            else:  # as many tokens as fit
                context = tokens[start + len(piece) - 33 : start]
            total += direct(lm, context, piece)[0]
        expected.append(total)
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_mixed_requests_are_answered_in_order_as_by_generate(sparse):
    long, short = {"max_gen_toks": NEW, "until": None}, {"max_new_tokens": 3, "until": [], "num_beams": 1}
    asked = [(prompt, settings) for prompt in PROMPTS for settings in (long, short)]
    answers = continue_all(sparse, *asked)
    texts = greedy(sparse, [sparse.tok_encode(prompt) for prompt in PROMPTS])
    assert len(set(texts)) == len(PROMPTS)
    assert answers[::2] == texts
    tokens = greedy(sparse, [sparse.tok_encode(prompt) for prompt in PROMPTS], new=3)
    assert answers[1::2] == tokens


def test_an_answer_stops_at_its_strings(dense):
    answers = continue_all(dense, *((prompt, {"max_gen_toks": NEW}) for prompt in PROMPTS))
    prompt, text = max(zip(PROMPTS, answers, strict=True), key=lambda pair: len(pair[1]))
    stop = text[4:7]  # of three tokens at least: every one is a byte
    assert len(stop) == 3 and text.index(stop) > 0
    asked = [{"until": stop}, {"until": ["not there", stop]}, {"until": ["", None]}]
    answers = continue_all(dense, *((prompt, {"max_gen_toks": NEW, **settings}) for settings in asked))
    before = text[: text.index(stop)]
    assert answers == [before, before, text]


def test_sampled_repeats_differ_and_come_again(dense):
    asked = [(PROMPTS[3], {"max_gen_toks": NEW, "do_sample": True, "temperature": 1.0})] * 3
    answers = continue_all(dense, *asked)
    assert len(set(answers)) == 3
    assert answers == continue_all(dense, *asked)


def test_what_is_truncated_is_counted(folder, caplog):
    lm = RecycledJax(pretrained=folder, policy="full", batch_size=4, max_length=40)
    tokens = lm.tok_encode(PROMPTS[1])
    answer, _ = continue_all(lm, (PROMPTS[1], {"max_gen_toks": NEW}), (PROMPTS[2], {"max_gen_toks": NEW}))
    assert len(tokens) > 40 and [answer] == greedy(lm, [tokens[-(40 - NEW) :]])
    ((score, _),) = lm.loglikelihood(ask("loglikelihood", (PROMPTS[1], "four")), disable_tqdm=True)
    # 41 tokens, the last of which is only scored; the harness counts the space among them
    np.testing.assert_allclose(score, direct(lm, tokens[-37:-1], plain(lm, " four"))[0], atol=1e-4)
    assert lm.get_model_info()["truncated"] == {"generate_until": 1, "loglikelihood": 1}
    assert "1 of 2 generate_until requests do not fit in max_length=40" in caplog.text
    with pytest.raises(ValueError, match="a continuation has 41 tokens"):
        lm.loglikelihood(ask("loglikelihood", ("a", "b" * 41)), disable_tqdm=True)


def test_bos_is_not_doubled(dense):
    (letter,) = plain(dense, "a")
    assert dense.tok_encode("<s>a") == dense.tok_encode("a") == [256, letter]
    assert (dense.prefix_token_id, dense.eot_token_id) == (256, 257)


def test_a_cache_of_answers_names_its_policy(dense, tmp_path):
    with pytest.raises(ValueError, match=f"use_cache=.*must have '{dense.digest}'"):
        CachingLM(dense, str(tmp_path / "answers.db"))
    cached = CachingLM(dense, str(tmp_path / f"answers_{dense.digest}.db"))
    requests = ask("generate_until", (PROMPTS[0], {"max_gen_toks": NEW}))
    answers = cached.generate_until(requests)
    steps = dense.get_model_info()["decode_steps"]
    assert cached.generate_until(requests) == answers
    assert dense.get_model_info()["decode_steps"] == steps
    dense.set_cache_hook(CacheHook(None))
    cached.dbdict.close()


TASKS = {
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["yes", "not at all"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


@pytest.fixture
def tasks(tmp_path, monkeypatch, dense):
    """A folder of tasks; of two questions to generate for, the dense policy answers one as wanted."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (answer,) = continue_all(dense, (PROMPTS[0], {"max_gen_toks": NEW, "until": "\n"}))
    documents = [{"text": PROMPTS[0], "answer": answer}, {"text": PROMPTS[3], "answer": "no model says this"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/data.jsonl}}\n"
            f"  cache_dir: {tmp_path}/cache\ntest_split: test\nmetadata: {{version: 1}}\n"
        )
        (tmp_path / f"{name}.yaml").write_text(head + task)
    return tmp_path


def check_results(results, policy, k):
    if policy == "full":
        assert results["results"]["tiny_generation"]["exact_match,none"] == 0.5
    assert results["results"]["tiny_choice"]["acc,none"] in (0, 0.5, 1)
    assert results["results"]["tiny_perplexity"]["byte_perplexity,none"] > 1
    assert results["config"]["policy"]["name"] == policy
    assert results["config"]["policy"].get("k") == k
    assert results["config"]["scoring"] == {"loglikelihood": "decode", "loglikelihood_rolling": "prefill"}


@pytest.mark.parametrize(("policy", "k"), [("full", None), ("recycled", 16)])
def test_the_harness_runs_local_tasks(folder, tasks, policy, k):
    results = simple_evaluate(
        model="recycled_jax",
        model_args=f"pretrained={folder},policy={policy}" + ("" if k is None else f",policy.k={k}"),
        tasks=list(TASKS),
        batch_size="4",
        device="cuda:0",
        bootstrap_iters=0,
        # without its own tasks, thousands of files that take a minute to read
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    check_results(results, policy, k)
    assert len(results["samples"]["tiny_generation"]) == 2


@pytest.mark.slow
def test_the_command_is_the_harness_s_own(folder, tasks, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kept"])
    flags = {"model": "recycled_jax", "tasks": ",".join(TASKS), "batch_size": "4", "include_path": str(tasks)}
    flags |= {"model_args": f"pretrained={folder},policy=recycled,policy.k=16", "output_path": str(tasks / "out")}
    run_harness([*(part for flag, value in flags.items() for part in (f"--{flag}", value)), "--log_samples"])
    assert sys.argv == ["kept"]
    (written,) = (tasks / "out").rglob("results_*.json")
    check_results(json.loads(written.read_text()), "recycled", 16)
    (samples,) = (tasks / "out").rglob("samples_tiny_generation_*.jsonl")
    assert [len(json.loads(line)["resps"]) for line in samples.read_text().splitlines()] == [1, 1]


def test_the_command_passes_its_arguments_on(capsys):
    with pytest.raises(SystemExit) as ended:
        run_harness(["run", "--help"])
    assert ended.value.code == 0 and "--model_args" in capsys.readouterr().out
