"""Bandwidth of every operation: `python -m eval.kernels --tokens '[8192, 32768, 131072]' --out kernels.json`.

One process, one step of one layer, median of several calls. Each operation stands beside the bytes it must move and the
rate of a plain device copy of the same run, and, where PyTorch is installed and has the device, beside PyTorch's SDPA
over the same keys and values.
"""

import functools
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jsonargparse import auto_cli

import pallas_kernels as ops
from eval.provenance import provenance


def kernels(
    out: Path,
    tokens: list[int] = [8192, 32768],  # noqa: B006  (a default for the command line, never changed)
    batch: int = 1,
    kv_heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    k: int = 4096,
    dtype: str = "bfloat16",
    implementation: str | None = None,
    calls: int = 20,
) -> None:
    """`k` slots in a selection, at most a quarter of the tokens; pages of 16 tokens, chunks of 256."""
    copy_rate = _copy_rate(calls)
    shape = {"batch": batch, "kv_heads": kv_heads, "group": group, "head_dim": head_dim, "dtype": dtype}
    cells = []
    for length in tokens:
        programs = operations(length, min(k, length // 4), implementation, **shape)
        for name, (function, arguments, moved) in programs.items():
            seconds = _median(jax.jit(function), arguments, calls)
            cells.append({"tokens": length, "operation": name, "microseconds": 1e6 * seconds, "bytes": moved})
        peer = _sdpa(length, calls, **shape)
        if peer is not None:
            moved = programs["decode_attention"][2]
            cells.append({"tokens": length, "operation": "torch SDPA", "microseconds": 1e6 * peer, "bytes": moved})
        for cell in cells:
            cell["bytes_per_second"] = cell["bytes"] / cell["microseconds"] * 1e6
            cell["share_of_copy"] = cell["bytes_per_second"] / copy_rate
        print(table([cell for cell in cells if cell["tokens"] == length]))
    setting = shape | {"k": k, "copy_bytes_per_second": copy_rate, "kind": "measured"}
    out.write_text(json.dumps({**provenance(), **setting, "cells": cells}, indent=1) + "\n")


def operations(
    tokens: int, k: int, implementation: str | None, *, batch: int, kv_heads: int, group: int, head_dim: int, dtype: str
) -> dict[str, tuple[Callable, tuple, int]]:
    """Every operation of one decode step: the function, its arguments, and the bytes it must read and write."""
    layout = ops.preferred_layout(implementation)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    heads = (batch, kv_heads, tokens, head_dim)
    q = jax.random.normal(next(keys), (batch, kv_heads * group, head_dim), dtype)
    cache = ops.from_heads(layout, *(jax.random.normal(next(keys), heads, dtype) for _ in range(2)))
    summaries = {
        count: ops.from_heads(layout, *(jax.random.normal(next(keys), (*heads[:2], count, head_dim), dtype),) * 2)
        for count in (tokens // 16, tokens // 256)
    }
    lengths = jnp.full((batch,), tokens, jnp.int32)
    chunk_counts = jnp.full((batch,), tokens // 256, jnp.int32)
    scores = jax.random.uniform(next(keys), heads[:3])
    positions = jax.random.randint(next(keys), (batch, kv_heads, k), 0, tokens, jnp.int32)
    compact = cache.empty_like(capacity=k)
    bounds, chunks = summaries[tokens // 16], summaries[tokens // 256].keys(0)
    valid = jnp.ones((batch, kv_heads, k), bool)
    both, one_score = _bytes(cache), scores.nbytes
    run = functools.partial(functools.partial, implementation=implementation)
    return {
        "decode_attention": (run(ops.decode_attention), (q, cache, lengths), both),
        "decode_attention with scores": (
            run(ops.decode_attention, return_scores=True),
            (q, cache, lengths),
            both + one_score,
        ),
        "token_scores": (run(ops.token_scores), (q, cache, lengths), both // 2 + one_score),
        "page_scores": (run(ops.page_scores, page_size=16), (q, bounds, lengths), _bytes(bounds)),
        "chunk_scores": (run(ops.chunk_scores), (q, chunks, chunk_counts), chunks.nbytes),
        "select_tokens": (run(ops.select_tokens, k=k, pool=7), (scores, lengths), one_score),
        "gather_selection": (run(ops.gather_selection), (cache, positions, compact), 2 * _bytes(compact)),
        "gather_attention": (run(ops.gather_attention), (q, cache, positions), _bytes(compact)),
        "selection_attention": (run(ops.selection_attention), (q, compact, valid), _bytes(compact)),
    }


def table(cells: list[dict]) -> str:
    """Markdown, a row per operation."""
    lines = ["| tokens | operation | µs | MB moved | GB/s | of a copy |", "|---" * 6 + "|"]
    lines += [
        f"| {c['tokens']} | {c['operation']} | {c['microseconds']:.0f} | {c['bytes'] / 1e6:.1f} "
        f"| {c['bytes_per_second'] / 1e9:.1f} | {c['share_of_copy']:.0%} |"
        for c in cells
    ]
    return "\n".join(lines)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _median(program: Callable, arguments: tuple, calls: int) -> float:
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _copy_rate(calls: int) -> float:
    """Bytes per second, read and written, of a copy of 256 MiB."""
    source = jnp.ones(1 << 26, jnp.float32)
    return 2 * source.nbytes / _median(jax.jit(jnp.copy), (source,), calls)


def _sdpa(tokens: int, calls: int, *, batch: int, kv_heads: int, group: int, head_dim: int, dtype: str) -> float | None:
    """Seconds of PyTorch's attention for the same step, or None where there is no PyTorch for this device."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    device = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend())
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        return None
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    q = torch.randn(batch, kv_heads * group, 1, head_dim, dtype=kind, device=device)
    k, v = (torch.randn(batch, kv_heads, tokens, head_dim, dtype=kind, device=device) for _ in range(2))
    seconds = []
    for call in range(calls + 1):
        started = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(head_dim), enable_gqa=True)
        if device == "cuda":
            torch.cuda.synchronize()
        if call:  # the first one warms up
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    auto_cli(kernels, as_positional=False)
