"""Run folders as an evaluation leaves them, with figures made up so that results can be worked out by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LENGTHS = (512, 1024)
EXAMPLES = 10
DEPTHS = (0, 50, 100)
DOCUMENTS, TOKENS, LAYERS = 4, 40, 3
POLICIES = (("full", None), ("recycled", 32), ("recycled", 64), ("snapkv", 32), ("snapkv", 64))
# Of ten answers to `single`, the last so many are wrong; the dense policy's are all right.
WRONG = {("full", None): 0, ("recycled", 32): 2, ("recycled", 64): 1, ("snapkv", 32): 5, ("snapkv", 64): 3}
# Added to the dense nats per token at each generated position but the first, which prefill predicts.
SLOPE = {("full", None): 0.0, ("recycled", 32): 0.0, ("recycled", 64): 0.0, ("snapkv", 32): 0.01, ("snapkv", 64): 0.004}
CONSTANT = {
    ("full", None): 0.0,
    ("recycled", 32): 0.1,
    ("recycled", 64): 0.05,
    ("snapkv", 32): 0.1,
    ("snapkv", 64): 0.05,
}
DECODE_MS = {
    ("full", None): 8.0,
    ("recycled", 32): 4.0,
    ("recycled", 64): 5.0,
    ("snapkv", 32): 3.5,
    ("snapkv", 64): 4.4,
}
_BY_LENGTH = (
    "score_against_budget",
    "score_against_latency",
    "stride_by_layer",
    "coverage_by_age",
    "overlap_by_layer",
    "output_length",
)
_OF_ALL = {"perplexity_by_position_512", "needle_score_rs_needle", "needle_difference_rs_needle", "bench_0"}
Key = tuple[str, int | None]


def picture_names(lengths: Sequence[int] = LENGTHS) -> set[str]:
    """The pictures of `write_runs`; 512 is among the lengths."""
    return {f"{name}_{length}" for name in _BY_LENGTH for length in lengths} | _OF_ALL


def write_runs(out: Path, lengths: Sequence[int] = LENGTHS) -> list[Path]:
    """Of the dense policy and of two others with two budgets each; the dense one comes first."""
    return [write_run(out, *key, lengths=lengths) for key in POLICIES]


def write_run(out: Path, name: str, k: int | None, lengths: Sequence[int] = LENGTHS) -> Path:
    key = (name, k)
    policy = {"name": name} | ({} if k is None else {"k": k}) | ({"stride": 8} if name == "recycled" else {})
    digest = f"{POLICIES.index(key):012x}"
    folder = out / f"tiny__{name}__{digest}"
    folder.mkdir(parents=True)
    model = {"name": "tiny", "weights": "aa11", "tokenizer": "bb22", "dtype": "float32"}
    config = {"schema": 1, "hash": digest, "model": model, "policy": policy, "mode": "gather", "question": "prefill"}
    write(folder / "config.json", config | {"template": None, "sampling": {"temperature": 0}})
    device = {"kind": "cpu", "count": 1, "machine": "x86_64"}
    meta = {
        "command": "python -m eval --config e.yaml",
        "started": "2026-01-02T03:04:05",
        "ended": "2026-01-02T03:14:05",
    }
    versions = {"jax": "0.11.1", "jaxlib": "0.11.1"}
    write(
        folder / "run_meta.json",
        [meta | {"hosts": 1, "processes": 1, "device": device, "versions": versions, "batch": 5}],
    )
    for length in lengths:
        _write_cell(folder, key, "single", length, [_single(key, i) for i in range(EXAMPLES)])
        _write_cell(folder, key, "rs_needle", length, [_needle(key, length, i) for i in range(2 * len(DEPTHS))])
    _write_cell(folder, key, "perplexity", 512, [_document(key, i) for i in range(DOCUMENTS)])
    lines = [json.dumps(bench_record(key, length)) for length in lengths]
    (folder / "bench.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def bench_record(key: Key, length: int, *, status: str = "ok", valid: bool = True) -> dict[str, Any]:
    name, k = key
    median = DECODE_MS[key] * (1 + length / 1024)
    dense = {"p10": 7.0 * (1 + length / 1024), "p50": 8.0 * (1 + length / 1024), "p90": 9.0 * (1 + length / 1024)}
    times = {"p10": 0.9 * median, "p50": median, "p90": 1.2 * median}
    return {
        "schema": 1, "kind": "measured", "valid": valid, "status": status, "date": "2026-01-02",
        "device": {"kind": "TPU v5e", "chips": 4, "mesh": {"data": 1, "tensor": 4}, "hbm_tb_s": 0.82},
        "model": "tiny", "weights": "real", "dtype": "bfloat16",
        "policy": {"name": name} | ({} if k is None else {"k": k}) | ({"stride": 8} if name == "recycled" else {}),
        "mode": "gather", "length": length, "capacity": 2 * length, "batch": 1, "decode_steps": 128, "repeats": 10,
        "decode_ms_per_step": None if status == "oom" else times,
        "dense": {"decode_ms_per_step": dense, "drift": 0.01},
        "ratio_decode": dense["p50"] / median, "ratio_prefill": 0.98,
        "bytes_per_step": {"weights": 1_000_000, "kv_read": 500_000, "kv_write": 1000, "scores": 0},
        "floor_ms": median / 2, "mbu": 0.5, "ideal_speedup": 2.5, "effective_stride": [8.0, 8.0, None],
    }  # fmt: skip


def _single(key: Key, index: int) -> dict[str, Any]:
    right = index < EXAMPLES - WRONG[key]
    longer = {"full": 0, "recycled": 1, "snapkv": 4}[key[0]]
    return _record(
        index, "single", f"{1000 + index}" if right else "?", [f"{1000 + index}"], right * 100.0, 8 + longer, {}
    )


def _needle(key: Key, length: int, index: int) -> dict[str, Any]:
    depth = DEPTHS[index % len(DEPTHS)]
    lost = (key[0] == "snapkv" and depth == 50) or (
        key == ("recycled", 32) and depth == 50 and length == 1024 and index < 3
    )
    text = "none" if lost else f"{2000 + index}"
    return _record(index, "rs_needle", text, [f"{2000 + index}"], 0.0 if lost else 100.0, 8, {"depth": depth})


def _document(key: Key, index: int) -> dict[str, Any]:
    nll = [1.0 + 0.1 * index + (CONSTANT[key] + SLOPE[key] * i if i else 0.0) for i in range(TOKENS)]
    record = _record(index, "perplexity", "", [], 0.0, TOKENS, {})
    del record["others"]["score"]
    record["others"]["nll"] = nll
    return record


def _record(
    index: int, task: str, pred: str, outputs: list[str], score: float, gen_tokens: int, meta: Mapping[str, Any]
) -> dict[str, Any]:
    others = {
        "line": index, "task": task, "target_length": 512, "prompt_tokens": 480, "gen_tokens": gen_tokens,
        "stop": "eos", "score": score, "policy_steps": 6.0, "effective_stride": 8.0, "density": 0.1, "meta": meta,
        "batch": 5, "config": "c", "cell": "d",
    }  # fmt: skip
    record = {"index": index, "pred": pred, "input": "…", "outputs": outputs, "others": others, "truncation": 0}
    return record | {"length": 480 + gen_tokens}


def _write_cell(folder: Path, key: Key, task: str, length: int, records: list[dict[str, Any]]) -> None:
    cell = folder / "cells" / task / str(length)
    of_perplexity = task == "perplexity"
    digest = f"{task}-{length}"
    description = {
        "name": task,
        "params": {},
        "length": length,
        "seed": 42,
        "version": 1,
        "metric": "all",
        "hash": digest,
    }
    write(cell / "task.json", description)
    write_lines(cell / "predictions.jsonl", records)
    write_lines(cell / "telemetry.jsonl", [_telemetry(key, record["others"]["line"]) for record in records])
    scores = [record["others"].get("score", 0.0) for record in records]
    score = sum(scores) / len(scores)
    nll = [value for record in records for value in record["others"].get("nll", [])]
    dense = key[0] == "full"
    write(cell / "timing.json", {"batch": 5, "prefill_ms": 50.0, "decode_ms_per_step": DECODE_MS[key]})
    write(
        cell / "metrics.json",
        {
            "task": task, "length": length, "metric": "all", "n": len(records), "failed": 0, "underfilled": 0,
            "empty": 0, "score": None if of_perplexity else score,
            "interval": None if of_perplexity else [max(0.0, score - 12), min(100.0, score + 12)],
            "prompt_tokens": 480.0, "gen_tokens": records[0]["others"]["gen_tokens"], "limit_share": 0.0,
            "policy_steps": 0.0 if dense else 6.0,
            "effective_stride": [None] * LAYERS if dense or key[0] == "snapkv" else [8.0, 4.0, 8.0],
            "overlap": None if dense or key[0] == "snapkv" else [0.5, 0.625, 0.75],
            "coverage": None if dense else [0.9, 0.8, 0.7],
            "density": 1.0 if dense else 0.1,
            "kv_bytes_per_step": 4_000_000 if dense else 1_000 * (key[1] or 0) * length // 64,
            "dense_kv_bytes_per_step": 4_000_000, "weight_bytes": 2_500_000,
            **({"ppl": math.exp(sum(nll) / len(nll)), "ppl_policy": 1.0, "tokens": len(nll)} if of_perplexity else {}),
            "dense": None,
        },
    )  # fmt: skip


def _telemetry(key: Key, line: int) -> dict[str, Any]:
    if key[0] == "full":
        return {"line": line, "layers": []}
    held = {32: 0.7, 64: 0.8}[key[1] or 32]
    falling = 0.01 if key[0] == "recycled" else 0.03
    return {
        "line": line,
        "layers": [
            {
                "layer": layer,
                "refreshes": [8, 16] if key[0] == "recycled" else [],
                "overlap": [0.5, None] if key[0] == "recycled" else [],
                "similarity": [],
                "coverage_by_age": [held + 0.05 * layer - falling * age for age in range(8)],
            }
            for layer in range(LAYERS)
        ],
    }
