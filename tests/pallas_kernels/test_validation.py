"""Arguments that do not fit end in one sentence with the argument, its value and what was expected."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels

Q, K, LENGTHS = jnp.zeros((2, 4, 8)), jnp.zeros((2, 2, 10, 8)), jnp.array([10, 3])
CHUNK, SEQUENCE = jnp.zeros((2, 4, 6, 8)), jnp.zeros((2, 4, 10, 8))
SCORES = jnp.zeros((2, 2, 10))
POSITIONS, VALID = jnp.zeros((2, 2, 5), jnp.int32), jnp.ones((2, 2, 10), bool)

MISTAKES = (
    # every attention: heads, shapes
    ("decode_attention", (Q[:, :3], K, K, LENGTHS), {}, "q has 3 query heads and k has 2 kv heads"),
    (
        "decode_attention",
        (Q, K, K[:, :, :9], LENGTHS),
        {},
        r"k has shape \(2, 2, 10, 8\) and v has shape \(2, 2, 9, 8\)",
    ),
    (
        "decode_attention",
        (Q[:1], K, K, LENGTHS),
        {},
        r"q has shape \(1, 4, 8\) and k has shape .* equal batch",
    ),
    ("decode_attention", (Q[..., :4], K, K, LENGTHS), {}, r"q has shape \(2, 4, 4\) .* head_dim \(last\)"),
    ("decode_attention", (CHUNK, K, K, LENGTHS), {}, r"q has shape \(2, 4, 6, 8\); expected 3 dimensions"),
    (
        "decode_attention",
        (Q, K[0], K[0], LENGTHS),
        {},
        r"k has shape \(2, 10, 8\); expected \[batch, kv_heads",
    ),
    (
        "decode_attention",
        (Q, K, K, LENGTHS[:1]),
        {},
        r"lengths has shape \(1,\); expected \(2,\), from the batch of q",
    ),
    ("decode_attention", (Q, K, K, LENGTHS + 1), {}, "lengths has values from 4 to 11; expected 0 to 10"),
    (
        "decode_attention",
        (Q, K, K, LENGTHS),
        {"group_reduction": "min"},
        "group_reduction='min' .* max, mean, sum",
    ),
    # scores
    ("token_scores", (Q[:, :3], K, LENGTHS), {}, "q has 3 query heads and k has 2 kv heads"),
    ("token_scores", (Q, K, -LENGTHS), {}, "lengths has values from -10 to -3; expected 0 to 10"),
    (
        "token_scores",
        (Q, K, LENGTHS),
        {"group_reduction": "first"},
        "group_reduction='first' .* max, mean, sum",
    ),
    # selection
    ("select_tokens", (SCORES[0], LENGTHS), {"k": 2}, r"scores has shape \(2, 10\); expected \[batch"),
    ("select_tokens", (SCORES, LENGTHS[:1]), {"k": 2}, r"lengths has shape \(1,\); expected \(2,\)"),
    ("select_tokens", (SCORES, LENGTHS + 1), {"k": 2}, "lengths has values from 4 to 11; expected 0 to 10"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 0}, r"k=0 is below sinks \+ self = 1"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "sinks": 4}, r"k=4 is below sinks \+ self = 5"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "sinks": -1}, "sinks=-1 is negative"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "pool": 4}, "pool=4 is not an odd number"),
    ("select_tokens", (SCORES, LENGTHS), {"k": 4, "pool": -1}, "pool=-1 is not an odd number"),
    (
        "gather_selection",
        (K, K[:1], POSITIONS),
        {},
        r"k has shape \(2, 2, 10, 8\) and v has shape \(1, 2, 10, 8\)",
    ),
    ("gather_selection", (K, K, POSITIONS[:1]), {}, r"positions has shape \(1, 2, 5\) and k has shape"),
    ("gather_selection", (K, K, POSITIONS - 2), {}, "positions has values from -2 to -2; expected -1 to 9"),
    # attention over a selection
    ("selection_attention", (Q, K, K, VALID[..., :9]), {}, r"valid has shape \(2, 2, 9\); .* from k_sel"),
    (
        "selection_attention",
        (Q, K, K[:1], VALID),
        {},
        r"k_sel has shape .* and v_sel has shape \(1, 2, 10, 8\)",
    ),
    ("gather_attention", (Q, K, K, POSITIONS[0]), {}, r"positions has shape \(2, 5\) and k has shape"),
    (
        "gather_attention",
        (Q, K, K, POSITIONS + 10),
        {},
        "positions has values from 10 to 10; expected -1 to 9",
    ),
    # whole sequences
    ("prefill_attention", (SEQUENCE, K[:, :, :9], K[:, :, :9], 0), {}, "q has 10 tokens and k has 9 slots"),
    ("prefill_attention", (CHUNK, K, K, 5), {}, "start has values from 5 to 5; expected 0 to 4"),
    (
        "prefill_attention",
        (CHUNK, K, K, jnp.int32(-1)),
        {},
        "start has values from -1 to -1; expected 0 to 4",
    ),
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


@pytest.mark.parametrize("operation", pallas_kernels.__all__)
def test_every_operation_rejects_an_unknown_implementation(operation):
    args = {
        "causal_attention": (SEQUENCE, K, K),
        "decode_attention": (Q, K, K, LENGTHS),
        "gather_attention": (Q, K, K, POSITIONS),
        "gather_selection": (K, K, POSITIONS),
        "prefill_attention": (CHUNK, K, K, 0),
        "select_tokens": (SCORES, LENGTHS),
        "selection_attention": (Q, K, K, VALID),
        "token_scores": (Q, K, LENGTHS),
    }[operation]
    options = {"k": 3} if operation == "select_tokens" else {}
    with pytest.raises(ValueError, match=f"implementation='fast' is not an implementation of {operation}"):
        getattr(pallas_kernels, operation)(*args, implementation="fast", **options)


def test_known_values_are_checked_inside_a_trace_too():
    """Lengths that a jitted function closes over are known while it is traced."""
    lengths = jnp.array([11, 11])
    with pytest.raises(ValueError, match="lengths has values from 11 to 11"):
        jax.jit(lambda q: pallas_kernels.decode_attention(q, K, K, lengths))(Q)
