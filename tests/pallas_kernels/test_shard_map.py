"""Every operation under `shard_map`: rows over one mesh axis, kv heads (and their query heads) over the other."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    causal_attention,
    chunk_scores,
    decode_attention,
    from_heads,
    gather_attention,
    gather_selection,
    interpreted,
    page_scores,
    prefill_attention,
    select_tokens,
    selection_attention,
    token_scores,
    verify_attention,
)
from tests.pallas_kernels.arg_specs import assert_close, generator, normal

BATCH, KV_HEADS, GROUP, TOKENS, HEAD_DIM, BUDGET = 4, 4, 2, 32, 16, 8
HEADS = P("data", "tensor")  # [batch, heads, ...]
ROWS = P("data")  # [batch]
CACHES = {
    "head_major": P(None, "data", "tensor"),  # [layers, batch, kv_heads, ...]
    "token_major": P(None, "data", None, None, "tensor"),  # [layers, batch, capacity, 2, rows, lanes]
}


def arguments(layout, getkey):
    q = normal(getkey(), (BATCH, KV_HEADS * GROUP, HEAD_DIM), "float32")
    sequence = normal(getkey(), (BATCH, KV_HEADS * GROUP, TOKENS, HEAD_DIM), "float32")
    k, v = (normal(getkey(), (BATCH, KV_HEADS, TOKENS, HEAD_DIM), "float32") for _ in range(2))
    random = generator(getkey())
    positions = jnp.asarray(random.integers(-1, TOKENS, (BATCH, KV_HEADS, BUDGET)), jnp.int32)
    scores = jnp.asarray(random.random((BATCH, KV_HEADS, TOKENS)), jnp.float32)
    lengths = jnp.array([TOKENS, 5, 0, 17])
    valid = jnp.asarray(random.random((BATCH, KV_HEADS, TOKENS)) < 0.5)
    cache = from_heads(layout, k, v)
    on_cache = CACHES[layout]
    return {
        "causal_attention": (causal_attention, (sequence, k, v), (HEADS, HEADS, HEADS), HEADS),
        "chunk_scores": (chunk_scores, (q, k, lengths), (HEADS, HEADS, ROWS), HEADS),
        "decode_attention": (decode_attention, (q, cache, lengths), (HEADS, on_cache, ROWS), HEADS),
        "gather_attention": (gather_attention, (q, cache, positions), (HEADS, on_cache, HEADS), HEADS),
        "gather_selection": (
            gather_selection,
            (cache, positions, cache.empty_like(capacity=BUDGET)),
            (on_cache, HEADS, on_cache),
            on_cache,
        ),
        "page_scores": (
            functools.partial(page_scores, page_size=4),
            (q, cache, lengths),
            (HEADS, on_cache, ROWS),
            HEADS,
        ),
        "prefill_attention": (
            prefill_attention,
            (sequence[:, :, :8], cache, jnp.int32(3)),
            (HEADS, on_cache, P()),
            HEADS,
        ),
        "select_tokens": (functools.partial(select_tokens, k=BUDGET), (scores, lengths), (HEADS, ROWS), HEADS),
        "selection_attention": (selection_attention, (q, cache, valid), (HEADS, on_cache, HEADS), HEADS),
        "token_scores": (token_scores, (q, cache, lengths), (HEADS, on_cache, ROWS), HEADS),
        "verify_attention": (
            functools.partial(verify_attention, return_scores=True),
            (sequence[:, :, :3], cache, lengths),
            (HEADS, on_cache, ROWS),
            (HEADS, P("data", None, "tensor")),
        ),
    }


OPERATIONS = tuple(arguments("head_major", lambda: jax.random.key(0)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("implementation", "layout"), [("xla", "head_major"), ("xla", "token_major"), ("pallas_tpu", "token_major")]
)
def test_every_operation_runs_sharded(operation, implementation, layout, getkey):
    function, args, in_specs, out_specs = arguments(layout, getkey)[operation]
    function = functools.partial(function, implementation=implementation)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    # The interpreter's kernels say nothing of how their outputs vary over the mesh, so that check is off.
    sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    with interpreted() if implementation == "pallas_tpu" else contextlib.nullcontext():
        together, apart = jax.jit(function)(*args), jax.jit(sharded)(*args)
        jax.block_until_ready((together, apart))
    for one, many in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        assert len(many.sharding.device_set) == 8
        if jnp.issubdtype(one.dtype, jnp.floating):
            assert_close(many, one, 3e-6)
        else:
            np.testing.assert_array_equal(many, one)
