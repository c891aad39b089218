"""select_tokens on TPU, in the interpreter: the same slots as the other implementations, and mistakes are seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import interpreted
from pallas_kernels.ops.select_tokens import tpu_compact, tpu_threshold
from pallas_kernels.ops.select_tokens.api import select_tokens

# Equal scores are common, both zeros among them; the kernel orders them by their bits.
VALUES = np.array([0.0, -0.0, 1e-30, 0.25, 0.5, 1.0, -1.0, -3e38, 3e38], np.float32)


def in_interpreter(dma="eager"):
    return interpreted(
        pltpu.InterpretParams(
            dma_execution_mode=dma, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )
    )


@functools.cache
def selecting(implementation, **options):
    return jax.jit(functools.partial(select_tokens, implementation=implementation, **options))


def rows(seed, batch, heads, tokens, draw):
    """Scores, with NaN in padding, and lengths of which the last is the whole row and one may be 0 or 1."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, tokens + 1, batch)
    lengths[-1] = tokens
    if batch > 1:
        lengths[0] = seed % 2
    scores = draw(random, (batch, heads, tokens)).astype(np.float32)
    scores = np.where(np.arange(tokens) < lengths[:, None, None], scores, np.nan)
    return jnp.asarray(scores, jnp.float32), jnp.asarray(lengths, jnp.int32)


DRAWS = {
    "few_values": lambda random, shape: random.choice(VALUES, shape),
    "all_equal": lambda random, shape: np.full(shape, 0.5),
    "clustered": lambda random, shape: np.arange(shape[-1]) // 7 + 0 * random.standard_normal(shape),
    "distinct": lambda random, shape: random.standard_normal(shape),
}
# batch, heads, tokens, options: three rows and more than 8, which fill a block and begin another; one row, which
# takes several sublanes; a selection of everything; every option.
CASES = (
    (1, 3, 300, {"k": 40, "sinks": 3, "recent": 5}),
    (5, 2, 300, {"k": 300, "ordered": False}),
    (1, 1, 9000, {"k": 1500, "pool": 3, "ordered": False}),
    (2, 2, 300, {"k": 20, "shared": "sum", "pool": 5, "recent": 2}),
    (2, 2, 300, {"k": 12, "shared": "union", "sinks": 1}),
    (2, 2, 300, {"k": 400, "shared": "max", "recall": 0.5}),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}x{}x{}_{}".format(*case[:3], "_".join(case[3])))
def test_same_selection_as_reference(case):
    *shape, options = case
    dma = "on_wait" if options["k"] == 300 else "eager"
    with in_interpreter(dma):
        for seed, draw in enumerate(DRAWS.values()):
            scores, lengths = rows(seed, *shape, draw)
            actual = np.asarray(selecting("pallas_tpu", **options)(scores, lengths))
            expected = np.asarray(selecting("xla", **options)(scores, lengths))
            m = options["k"] - options.get("sinks", 0) - options.get("recent", 1)
            if not options.get("ordered", True):
                actual, expected = (
                    np.concatenate([np.sort(x[..., :m], axis=-1), x[..., m:]], axis=-1) for x in (actual, expected)
                )
            np.testing.assert_array_equal(actual, expected)


def takes_one_too_few(total, need):
    return total > need


def copies_from_one_too_far(word_ref, way_ref, distance, places, fill=tpu_compact._fill):
    fill(word_ref, way_ref, distance + (distance == 2), places)


def stops_one_short(word_ref, way_ref, lanes, bit, used, move=tpu_compact._left_by_lanes):
    move(word_ref, way_ref, lanes - (bit == tpu_compact.PLACE_BITS + 2), bit, used)


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (tpu_threshold, "_enough", takes_one_too_few),
        (tpu_compact, "_fill", copies_from_one_too_far),
        (tpu_compact, "_left_by_lanes", stops_one_short),
    ],
    ids=["tie_cut", "fill", "move"],
)
def test_a_mistake_in_the_kernel_is_seen(monkeypatch, module, name, broken):
    monkeypatch.setattr(module, name, broken)
    scores, lengths = rows(0, 1, 3, 300, DRAWS["few_values"])
    with in_interpreter():
        actual = select_tokens(scores, lengths, k=40, implementation="pallas_tpu")
    expected = select_tokens(scores, lengths, k=40, implementation="xla")
    assert actual.tolist() != expected.tolist()


def test_too_many_tokens_are_declined():
    scores = jax.ShapeDtypeStruct((1, 1, tpu_compact.MAX_SLOTS + 1), jnp.float32)
    with pytest.raises(NotImplementedError, match="scores has 262145 tokens; the kernel has room for at most 262144"):
        with in_interpreter():
            jax.eval_shape(selecting("pallas_tpu", k=17), scores, jax.ShapeDtypeStruct((1,), jnp.int32))
