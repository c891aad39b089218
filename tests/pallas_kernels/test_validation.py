"""Arguments that do not fit end in one sentence with the argument, its value and what was expected."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
import pallas_kernels.ops
from pallas_kernels import KVCache, from_heads

Q, K, LENGTHS = jnp.zeros((2, 4, 8)), jnp.zeros((2, 2, 10, 8)), jnp.array([10, 3])
CACHE, TOKEN_MAJOR = (from_heads(layout, K, K) for layout in ("head_major", "token_major"))
CHUNK, SEQUENCE = jnp.zeros((2, 4, 6, 8)), jnp.zeros((2, 4, 10, 8))
SCORES = jnp.zeros((2, 2, 10))
POSITIONS, VALID = jnp.zeros((2, 2, 5), jnp.int32), jnp.ones((2, 2, 10), bool)
COMPACT = CACHE.empty_like(capacity=5)


def made_of(cache: KVCache, *arrays: jax.Array) -> KVCache:
    """A cache that no constructor would make: annotations are checked there, but not when a tree is put together."""
    return jax.tree.unflatten(jax.tree.structure(cache), arrays)


MISTAKES = (
    # every attention: heads, shapes, layers
    ("decode_attention", (Q[:, :3], CACHE, LENGTHS), {}, "q has 3 query heads and cache has 2 kv heads"),
    (
        "decode_attention",
        (Q, made_of(CACHE, K[None], K[None, :, :, :9]), LENGTHS),
        {},
        r"cache.k has shape \(1, 2, 2, 10, 8\) and cache.v has shape \(1, 2, 2, 9, 8\)",
    ),
    (
        "decode_attention",
        (Q, made_of(CACHE, K, K), LENGTHS),
        {},
        r"cache.k has shape .*; expected \[layers",
    ),
    (
        "decode_attention",
        (Q, made_of(TOKEN_MAJOR, K), LENGTHS),
        {},
        r"cache.kv has shape .*; expected \[layers",
    ),
    ("decode_attention", (Q, K, LENGTHS), {}, "cache is a ArrayImpl; expected a KVCache"),
    ("decode_attention", (Q, CACHE, LENGTHS), {"layer": 1}, "layer has values from 1 to 1; expected 0 to 0"),
    ("decode_attention", (Q[:1], CACHE, LENGTHS), {}, r"q has shape \(1, 4, 8\) and cache has batch 2 .* equal batch"),
    ("decode_attention", (Q[..., :4], CACHE, LENGTHS), {}, r"q has shape \(2, 4, 4\) .* head_dim \(last\)"),
    ("decode_attention", (CHUNK, CACHE, LENGTHS), {}, r"q has shape \(2, 4, 6, 8\); expected 3 dimensions"),
    (
        "decode_attention",
        (Q, CACHE, LENGTHS[:1]),
        {},
        r"lengths has shape \(1,\); .* from the batch of q",
    ),
    ("decode_attention", (Q, CACHE, LENGTHS + 1), {}, "lengths has values from 4 to 11; expected 0 to 10"),
    ("decode_attention", (Q, CACHE, LENGTHS), {"group_reduction": "min"}, "group_reduction='min' .* max, mean, sum"),
    # scores
    ("token_scores", (Q[:, :3], CACHE, LENGTHS), {}, "q has 3 query heads and cache has 2 kv heads"),
    ("token_scores", (Q, CACHE, -LENGTHS), {}, "lengths has values from -10 to -3; expected 0 to 10"),
    ("token_scores", (Q, CACHE, LENGTHS), {"group_reduction": "first"}, "group_reduction='first' .* max, mean, sum"),
    # a few steps
    ("verify_attention", (Q, CACHE, LENGTHS), {}, r"q has shape \(2, 4, 8\); expected 4 dimensions"),
    ("verify_attention", (CHUNK, COMPACT, LENGTHS), {}, "q has 6 steps and cache has 5 slots; expected 1 to as many"),
    ("verify_attention", (CHUNK[:, :, :0], CACHE, LENGTHS), {}, "q has 0 steps and cache has 10 slots"),
    ("verify_attention", (CHUNK[:, :3], CACHE, LENGTHS), {}, "q has 3 query heads and cache has 2 kv heads"),
    ("verify_attention", (CHUNK, CACHE, LENGTHS[:1]), {}, r"start has shape \(1,\); .* from the batch of q"),
    ("verify_attention", (CHUNK, CACHE, LENGTHS + 1), {}, "start has values from 4 to 11; expected 0 to 10"),
    ("verify_attention", (CHUNK, CACHE, LENGTHS), {"layer": 1}, "layer has values from 1 to 1; expected 0 to 0"),
    ("verify_attention", (CHUNK, CACHE, LENGTHS), {"group_reduction": "min"}, "group_reduction='min' .* max, mean"),
    # selection
    ("select_tokens", (SCORES[0], LENGTHS), {"k": 2}, r"scores has shape \(2, 10\); expected \[batch"),
    ("select_tokens", (SCORES, LENGTHS[:1]), {"k": 2}, r"lengths has shape \(1,\); expected \(2,\)"),
    ("select_tokens", (SCORES, LENGTHS + 1), {"k": 2}, "lengths has values from 4 to 11; expected 0 to 10"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 0}, r"k=0 is below sinks \+ self = 1"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "sinks": 4}, r"k=4 is below sinks \+ self = 5"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "sinks": -1}, "sinks=-1 is negative"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "pool": 4}, "pool=4 is not an odd number"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "pool": -1}, "pool=-1 is not an odd number"),
    ("gather_selection", (CACHE, POSITIONS[:1], COMPACT), {}, r"positions has shape \(1, 2, 5\) and cache has batch 2"),
    ("gather_selection", (CACHE, POSITIONS - 2, COMPACT), {}, "positions has values from -2 to -2; expected -1 to 9"),
    ("gather_selection", (CACHE, POSITIONS, CACHE), {}, r"into has .* \(HeadMajor, 1, 2, 2, 10, 8, .* 1, 2, 2, 5, 8,"),
    ("gather_selection", (TOKEN_MAJOR, POSITIONS, COMPACT), {}, r"into has .* \(HeadMajor, .* expected \(TokenMajor,"),
    (
        "gather_selection",
        (CACHE, POSITIONS, COMPACT),
        {"rows": jnp.ones(3, bool)},
        r"rows has shape \(3,\); expected \(2,\), from the batch of cache",
    ),
    # attention over a selection
    ("selection_attention", (Q, CACHE, VALID[..., :9]), {}, r"valid has shape \(2, 2, 9\); .* from selection"),
    ("selection_attention", (Q[:, :3], CACHE, VALID), {}, "q has 3 query heads and selection has 2 kv heads"),
    ("gather_attention", (Q, CACHE, POSITIONS[0]), {}, r"positions has shape \(2, 5\) and cache has batch 2"),
    ("gather_attention", (Q, CACHE, POSITIONS + 10), {}, "positions has values from 10 to 10; expected -1 to 9"),
    # whole sequences
    ("prefill_attention", (SEQUENCE, COMPACT, 0), {}, "q has 10 tokens and cache has 5 slots"),
    ("prefill_attention", (CHUNK, CACHE, 5), {}, "start has values from 5 to 5; expected 0 to 4"),
    ("prefill_attention", (CHUNK, CACHE, jnp.int32(-1)), {}, "start has values from -1 to -1; expected 0 to 4"),
    ("causal_attention", (CHUNK, K, K), {}, "q has 6 tokens and k has 10; expected as many queries as keys"),
    ("causal_attention", (Q, K, K), {}, r"q has shape \(2, 4, 8\); expected 4 dimensions"),
)


@pytest.mark.parametrize(
    ("operation", "args", "options", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_mistake_is_named(operation, args, options, message):
    # Unwrapped, because the suite checks annotations, and that would object to most of these first.
    function = inspect.unwrap(getattr(pallas_kernels, operation))
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


OPERATIONS = {path.parent.name for path in pathlib.Path(pallas_kernels.ops.__path__[0]).glob("*/api.py")}


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
@pytest.mark.parametrize(
    ("implementation", "error", "message"),
    [
        ("fast", ValueError, "implementation='fast' is not an implementation of {}"),
        (
            "pallas_tpu",
            NotImplementedError,
            "implementation='pallas_tpu' of {} needs a TPU and this program is for cpu",
        ),
    ],
)
def test_every_operation_rejects_an_implementation_that_cannot_run(operation, implementation, error, message):
    args = {
        "causal_attention": (SEQUENCE, K, K),
        "chunk_scores": (Q, K, LENGTHS),
        "decode_attention": (Q, CACHE, LENGTHS),
        "gather_attention": (Q, CACHE, POSITIONS),
        "gather_selection": (CACHE, POSITIONS, COMPACT),
        "page_scores": (Q, CACHE, LENGTHS),
        "prefill_attention": (CHUNK, CACHE, 0),
        "select_tokens": (SCORES, LENGTHS),
        "selection_attention": (Q, CACHE, VALID),
        "token_scores": (Q, CACHE, LENGTHS),
        "verify_attention": (CHUNK, CACHE, LENGTHS),
    }[operation]
    options = {"select_tokens": {"k": 3}, "page_scores": {"page_size": 16}}.get(operation, {})
    with pytest.raises(error, match=message.format(operation)):
        getattr(pallas_kernels, operation)(*args, implementation=implementation, **options)


def test_known_values_are_checked_inside_a_trace_too():
    """Lengths that a jitted function closes over are known while it is traced."""
    lengths = jnp.array([11, 11])
    with pytest.raises(ValueError, match="lengths has values from 11 to 11"):
        jax.jit(lambda q: pallas_kernels.decode_attention(q, CACHE, lengths))(Q)
