"""What the compiled programs of the XLA implementations do with memory, read from the programs themselves."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    causal_attention,
    decode_attention,
    empty_cache,
    gather_attention,
    prefill_attention,
    token_scores,
    verify_attention,
)

BATCH, KV_HEADS, GROUP, TOKENS, HEAD_DIM = 2, 2, 2, 4096, 64
QUERY = jax.ShapeDtypeStruct((BATCH, KV_HEADS * GROUP, HEAD_DIM), jnp.float32)
LENGTHS = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
CACHE_ELEMENTS = BATCH * KV_HEADS * TOKENS * HEAD_DIM


def cache(dtype, batch=BATCH, tokens=TOKENS, head_dim=HEAD_DIM):
    shape = {"layers": 1, "batch": batch, "kv_heads": KV_HEADS, "capacity": tokens, "head_dim": head_dim}
    return jax.eval_shape(lambda: empty_cache("head_major", dtype=dtype, **shape))


def compile_xla(operation, *args, **options):
    return jax.jit(functools.partial(operation, implementation="xla", **options)).lower(*args).compile()


def written(compiled) -> list[tuple[str, int]]:
    """Opcode and number of elements of every instruction that makes new data, also inside fusions."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", compiled.as_text())
    views = {"parameter", "bitcast", "get-tuple-element"}
    return [
        (opcode, math.prod(map(int, filter(None, dims.split(","))))) for dims, opcode in found if opcode not in views
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("return_scores", [False, True])
def test_decode_attention_reads_the_cache_once_as_stored(dtype, return_scores):
    compiled = compile_xla(decode_attention, QUERY, cache(dtype), LENGTHS, return_scores=return_scores)
    assert [name for name, elements in written(compiled) if elements >= CACHE_ELEMENTS] == []
    # One product with k and one with v: the scores reuse the logits.
    assert [name for name, _ in written(compiled)].count("dot") == 2


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_attention_reads_the_cache_once_for_all_steps(dtype, steps):
    queries = jax.ShapeDtypeStruct((BATCH, KV_HEADS * GROUP, steps, HEAD_DIM), jnp.float32)
    compiled = compile_xla(verify_attention, queries, cache(dtype), LENGTHS, return_scores=True)
    # What may be larger than the cache is logits: one for each query and slot.
    assert [found for found in written(compiled) if found[1] % CACHE_ELEMENTS == 0] == []
    assert [name for name, _ in written(compiled)].count("dot") == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_scores_copies_nothing(dtype):
    compiled = compile_xla(token_scores, QUERY, cache(dtype), LENGTHS)
    assert [name for name, elements in written(compiled) if elements >= CACHE_ELEMENTS] == []
    assert [name for name, _ in written(compiled)].count("dot") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gather_attention_does_not_grow_with_the_cache(dtype):
    positions = jax.ShapeDtypeStruct((BATCH, KV_HEADS, 128), jnp.int32)
    compiled = compile_xla(gather_attention, QUERY, cache(dtype), positions)
    assert max(elements for _, elements in written(compiled)) < CACHE_ELEMENTS // 4


SEQUENCE = 2048
QUERIES = jax.ShapeDtypeStruct((1, 4, SEQUENCE, 32), jnp.float32)
KEYS = jax.ShapeDtypeStruct((1, 2, SEQUENCE, 32), jnp.float32)
ALL_LOGITS_BYTES = 4 * SEQUENCE**2 * 4  # 4 query heads, float32


def gradients(q, k, v, implementation):
    attend = functools.partial(causal_attention, implementation=implementation)
    return jax.grad(lambda *args: jnp.sum(attend(*args)), argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize(("operation", "share"), [(causal_attention, 0.3), (gradients, 0.5)])
def test_causal_attention_never_holds_all_logits(operation, share):
    """A chunk waits for the one before it; run side by side they would take 0.8 forward and 1.7 backward."""
    compiled = compile_xla(operation, QUERIES, KEYS, KEYS)
    assert max(elements for _, elements in written(compiled)) < SEQUENCE**2
    assert compiled.memory_analysis().temp_size_in_bytes < share * ALL_LOGITS_BYTES


def test_the_measure_sees_all_logits_where_there_are():
    compiled = (
        jax.jit(functools.partial(causal_attention, implementation="reference")).lower(QUERIES, KEYS, KEYS).compile()
    )
    assert max(elements for _, elements in written(compiled)) >= 4 * SEQUENCE**2
    assert compiled.memory_analysis().temp_size_in_bytes >= ALL_LOGITS_BYTES


def test_prefill_attention_memory_does_not_grow_with_the_cache():
    chunk = jax.ShapeDtypeStruct((1, 4, 256, 32), jnp.float32)
    start = jax.ShapeDtypeStruct((), jnp.int32)
    temporary = {}
    for tokens in (2048, 8192):
        compiled = compile_xla(prefill_attention, chunk, cache("float32", 1, tokens, 32), start)
        assert max(elements for _, elements in written(compiled)) < 4 * 256 * tokens
        temporary[tokens] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[8192] <= 1.01 * temporary[2048]
