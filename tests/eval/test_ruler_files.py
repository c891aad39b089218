"""Files of RULER: generated ones are read, and what we write is scored by a reader that knows only RULER's rules."""

import csv
import json
from pathlib import Path

import pytest

from eval.metrics import METRICS, clean
from eval.ruler_files import (
    RULER_TASKS,
    RulerExample,
    TaskScore,
    find_ruler,
    gen_tokens_of_task,
    metric_of_task,
    prediction_record,
    read_ruler,
    summary_csv,
)


def line(**fields) -> str:
    return json.dumps({"index": 0, "input": "What is it?", "outputs": ["7"], "length": 100, **fields}) + "\n"


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_lines_are_the_keys_and_indices_pass_through(tmp_path):
    path = write(
        tmp_path / "validation.jsonl",
        line(index=812, answer_prefix=" It is", token_position_answer=9),
        line(index=812, input="<|begin_of_text|>What\u2028is it?"),
        " \n",
        line(index="x7", outputs=["a", "b", "a"]),
        "\n",
    )
    assert read_ruler(path) == [
        RulerExample(0, 812, "What is it?", " It is", ("7",)),
        RulerExample(1, 812, "<|begin_of_text|>What\u2028is it?", "", ("7",)),
        RulerExample(3, "x7", "What is it?", "", ("a", "b", "a")),
    ]
    assert [example.prompt for example in read_ruler(path)][:2] == [
        "What is it? It is",
        "<|begin_of_text|>What\u2028is it?",
    ]


def test_one_output_stands_for_outputs_only_where_there_are_none(tmp_path):
    alone = json.dumps({"index": 1, "input": "?", "output": "yes"}) + "\n"
    path = write(tmp_path / "validation.jsonl", alone, line(output="yes"))
    assert [example.outputs for example in read_ruler(path)] == [("yes",), ("7",)]


def test_text_is_utf_8(tmp_path):
    path = write(tmp_path / "validation.jsonl", line(input="INPUT").replace("INPUT", "¿qué?"))
    assert read_ruler(path)[0].input == "¿qué?"
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"validation.jsonl, line 1: .*utf-8"):
        read_ruler(path)


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"index": 0, "inp', r"no JSON \(.*, column 18\), expected one object"),
        ("[1, 2]", r"\[1, 2\] is no object, expected one with index, input and outputs"),
        ('{"input": "?", "outputs": ["7"]}', "index is missing, expected index, input and outputs"),
        ('{"index": 0, "outputs": ["7"]}', "input has null, expected text"),
        ('{"index": 0, "input": "?"}', "outputs has null, expected text"),
        ('{"index": 0, "input": "?", "outputs": []}', r"outputs=\[\], expected a list of one text or more"),
        ('{"index": 0, "input": "?", "outputs": "7"}', 'outputs="7", expected a list of one text or more'),
        ('{"index": 0, "input": "?", "outputs": ["7", 7]}', "outputs has 7, expected text"),
        ('{"index": 0, "input": "?", "outputs": ["7"], "answer_prefix": 1}', "answer_prefix has 1, expected text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, bad, message):
    path = write(tmp_path / "validation.jsonl", line(), "\n", bad + "\n", line())
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 3: " + message):
        read_ruler(path)


def test_files_are_found_where_ruler_puts_them(tmp_path):
    wanted = [
        ("llama", "synthetic", 4096, "niah_single_1"),
        ("llama", "synthetic", 4096, "vt"),
        ("llama", "synthetic", 4096, "qa_2"),
        ("llama", "synthetic", 4096, "own"),
        ("llama", "synthetic", 16384, "cwe"),
        ("qwen", "other", 4096, "fwe"),
    ]
    for model, benchmark, length, task in reversed(wanted):
        write(tmp_path / model / benchmark / str(length) / "data" / task / "validation.jsonl", line())
    write(tmp_path / "llama/synthetic/4096/data/vt/test.jsonl", line())
    write(tmp_path / "llama/synthetic/4096/pred/vt.jsonl", line())
    write(tmp_path / "llama/synthetic/old/data/vt/validation.jsonl", line())
    found = find_ruler(tmp_path)
    assert [(file.model, file.benchmark, file.length, file.task) for file in found] == wanted
    assert all(read_ruler(file.path) for file in found)
    assert found[1].predictions == tmp_path / "llama/synthetic/4096/pred/vt.jsonl"
    with pytest.raises(ValueError, match=r"root=.* has no RULER data, expected files \{model\}/\{benchmark\}/"):
        find_ruler(tmp_path / "llama")


def test_metrics_and_lengths_of_ruler_tasks():
    assert {task: (metric_of_task(task), gen_tokens_of_task(task)) for task in RULER_TASKS} == {
        **{task: ("all", 128) for task in RULER_TASKS[:8]},
        "vt": ("all", 30),
        "cwe": ("all", 120),
        "fwe": ("all", 50),
        "qa_1": ("part", 32),
        "qa_2": ("part", 32),
    }
    assert len(set(RULER_TASKS)) == 13
    for of in (metric_of_task, gen_tokens_of_task):
        with pytest.raises(
            ValueError, match="name='rs_vt' is no task of RULER, expected one that begins with niah, vt"
        ):
            of("rs_vt")


def test_an_id_among_the_others_would_replace_the_index():
    with pytest.raises(ValueError, match="others has id=3, expected another name"):
        prediction_record(index=1, pred="", input="?", outputs=("7",), others={"id": 3}, length=9)


# The fields that RULER's evaluate.py reads and the metrics of its constants.py, written anew and without our own code.
def score_as_ruler_does(path: Path, task: str) -> tuple[float, str, list]:
    """Score, nulls and indices of a file of predictions."""
    total, nulls, indices = 0.0, 0, []
    records = [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n")[:-1]]
    for record in records:
        record["input"].upper()
        stripped = record["pred"].strip()
        answer = "".join("\n" if ord(sign) < 32 else sign for sign in stripped).strip().lower()
        references = record["outputs"] if "outputs" in record else [record.get("output", "")]
        hits = [float(reference.lower() in answer) for reference in references]
        total += max(hits) if task.startswith("qa") else sum(hits) / len(references)
        nulls += answer == ""
        indices.append(record["others"].get("id", record["index"]))
    return round(100 * total / len(records), 2), f"{nulls}/{len(records)}", indices


ANSWERS = {
    "niah_multivalue": ["1111 and 2222", "3333\x07", "", "none"],
    "vt": ["ABCDE abcde", "\x00", "\n\t", "1111 2222"],
    "qa_1": ["It is 1111.", "2222", "in FRANCE", " "],
}
OUTPUTS = [["1111", "2222", "3333"], ["3333"], ["France", "the country of France"], ["x", "y"]]


def test_our_predictions_are_scored_alike_by_rulers_rules(tmp_path):
    columns, expected = [], {}
    for task, answers in ANSWERS.items():
        data = write(
            tmp_path / f"m/synthetic/4096/data/{task}/validation.jsonl",
            *(line(index=5, outputs=outputs, answer_prefix=" Answer:") for outputs in OUTPUTS),
        )
        records = [
            prediction_record(
                index=example.index,
                pred=answer,
                input=example.prompt,
                outputs=example.outputs,
                others={"line": example.line, "task": task},
                length=4000,
            )
            for example, answer in zip(read_ruler(data), answers, strict=True)
        ]
        metric = METRICS[metric_of_task(task)]
        scores = [metric(record["pred"], record["outputs"], {})["score"] for record in records]
        empty = sum(not clean(record["pred"]) for record in records)
        columns.append(TaskScore(task, sum(scores) / len(scores), empty, len(scores)))
        written = write(tmp_path / f"{task}.jsonl", *(json.dumps(record) + "\n" for record in records))
        score, nulls, indices = score_as_ruler_does(written, task)
        expected[task] = (str(score), nulls)
        assert indices == [5] * 4
        assert [list(record) for record in records] == [
            ["index", "pred", "input", "outputs", "others", "truncation", "length"]
        ] * 4
        assert all(record["input"].endswith("? Answer:") and record["truncation"] == 0 for record in records)
    rows = list(csv.reader(summary_csv(columns).splitlines()))
    assert rows[1] == ["Tasks", *ANSWERS]
    assert {task: (score, nulls) for task, score, nulls in zip(*rows[1:], strict=True)} == {
        "Tasks": ("Score", "Nulls"),
        **expected,
    }
    # by hand: 2/3, 1, 0, 0; nothing; 1, 0, 1, 0
    assert expected == {"niah_multivalue": ("41.67", "1/4"), "vt": ("0.0", "2/4"), "qa_1": ("50.0", "1/4")}


def test_a_summary_has_rulers_tasks_in_its_order_then_others():
    columns = [
        TaskScore("rs_b", 1, 0, 2),
        TaskScore("qa_1", 200 / 3, 1, 3),
        TaskScore("rs_a", 100, 2, 2),
        TaskScore("vt", 0.0, 3, 3),
    ]
    assert summary_csv(columns) == (
        "0,1,2,3,4\nTasks,vt,qa_1,rs_b,rs_a\nScore,0.0,66.67,1.0,100.0\nNulls,3/3,1/3,0/2,2/2\n"
    )
