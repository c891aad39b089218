"""select_tokens on TPU, in the interpreter: the same slots as the other implementations, and mistakes are seen."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import interpreted
from pallas_kernels.ops.select_tokens import tpu_compact, tpu_pool, tpu_sort, tpu_threshold
from pallas_kernels.ops.select_tokens.api import select_tokens

# Equal scores are common, both zeros among them; the kernel orders them by their bits.
VALUES = np.array([0.0, -0.0, 1e-30, 0.25, 0.5, 1.0, -1.0, -3e38, 3e38], np.float32)

# An interpreted kernel runs once: what optimising it costs would not come back.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def in_interpreter(dma="eager"):
    return interpreted(
        pltpu.InterpretParams(
            dma_execution_mode=dma, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )
    )


def rows(batch, heads, tokens):
    """Scores, every head in one of several manners, NaN in padding; lengths from an empty row to a full one."""
    random = np.random.default_rng(tokens)
    manners = itertools.cycle(
        (
            lambda: random.choice(VALUES, tokens),
            lambda: np.full(tokens, 0.5),
            lambda: np.arange(tokens) // 7,
            lambda: random.standard_normal(tokens),
        )
    )
    scores = np.array([[next(manners)() for _ in range(heads)] for _ in range(batch)], np.float32)
    lengths = np.array([tokens, tokens // 2, 1, 0, tokens - 1][:batch])
    scores = np.where(np.arange(tokens) < lengths[:, None, None], scores, np.float32(np.nan))
    return jnp.asarray(scores), jnp.asarray(lengths, jnp.int32)


# When DMAs run, batch, heads, tokens, options: each way of running DMAs meets every kernel. Rows that fill a block and
# begin another; one row, which takes several sublanes and more than one group in each, with up to all bits of a word
# chosen; heads that share, and more entries than slots.
CASES = {
    "ten_rows": ("on_wait", 5, 2, 300, {"k": 40, "sinks": 3, "recent": 5, "pool": 3}),
    "one_long_row": ("on_wait", 1, 1, 9000, {"k": 4300, "ordered": False}),
    "sum_of_all": ("eager", 2, 2, 300, {"k": 400, "shared": "sum", "pool": 5, "recent": 2, "recall": 0.5}),
    "union": ("eager", 2, 2, 300, {"k": 12, "shared": "union", "sinks": 1, "ordered": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_selection_as_xla(case):
    dma, *shape, options = CASES[case]
    scores, lengths = rows(*shape)

    def select(implementation):
        program = functools.partial(select_tokens, implementation=implementation, **options)
        positions = np.array(jax.jit(program, compiler_options=QUICK)(scores, lengths))
        if not options.get("ordered", True):
            m = options["k"] - options.get("sinks", 0) - options.get("recent", 1)
            positions[..., :m].sort(axis=-1)
        return positions

    with in_interpreter(dma):
        actual = select("pallas_tpu")
    np.testing.assert_array_equal(actual, select("xla"))


KEYS = rows(1, 3, 300)[0][0]
BEGIN, END, CHOSEN, POOL = 2, 290, 40, 5
ENDS = jnp.full(3, END)


def strongest_first(row):
    return sorted(range(BEGIN, END), key=lambda slot: (-float(KEYS[row, slot]), slot))[:CHOSEN]


STRONGEST_FIRST = np.array([strongest_first(row) for row in range(3)])
BITS = np.zeros((1, 1, 8, 128), np.int32)
for row, slot in np.ndindex(3, CHOSEN):
    number = STRONGEST_FIRST[row, slot]
    BITS[0, 0, row, number % 128] |= 1 << (number // 128)
NEIGHBOURS = np.lib.stride_tricks.sliding_window_view(
    np.pad(KEYS[:, BEGIN:END], ((0, 0), (POOL // 2, POOL // 2)), constant_values=-np.inf), POOL, axis=1
)

# What each kernel gives, and what it is to give.
KERNELS = {
    "threshold": (lambda: tpu_threshold.chosen_bits(KEYS, BEGIN, ENDS, CHOSEN), BITS),
    "compact": (lambda: jnp.sort(tpu_compact.slots_of_bits(jnp.asarray(BITS), CHOSEN)[:3]), np.sort(STRONGEST_FIRST)),
    "sort": (
        lambda: tpu_sort.weakest_first(KEYS, jnp.pad(jnp.sort(STRONGEST_FIRST), ((0, 5), (0, 0)))),
        STRONGEST_FIRST[:, ::-1],
    ),
    "pool": (lambda: tpu_pool.pooled(KEYS, BEGIN, ENDS, POOL)[:, BEGIN:END], NEIGHBOURS.max(axis=-1)),
}


def needs_one_more(total, need):
    return total > need


def stops_one_short(word_ref, way_ref, lanes, bit, used, move=tpu_compact._left_by_lanes):
    move(word_ref, way_ref, lanes - (bit == tpu_compact.PLACE_BITS + 2), bit, used)


def lower_slot_first(key, slot, other_key, other_slot):
    return (key < other_key) | ((key == other_key) & (slot < other_slot))


def one_lane_short(x, lanes, right=tpu_pool._right):
    return right(x, lanes - 1)


@pytest.mark.parametrize(
    ("kernel", "module", "name", "broken"),
    [
        ("threshold", tpu_threshold, "_enough", needs_one_more),
        ("compact", tpu_compact, "_left_by_lanes", stops_one_short),
        ("sort", tpu_sort, "_before", lower_slot_first),
        ("pool", tpu_pool, "_right", one_lane_short),
    ],
    ids=KERNELS,
)
def test_a_mistake_in_a_kernel_is_seen(monkeypatch, kernel, module, name, broken):
    run, expected = KERNELS[kernel]

    def result():
        with in_interpreter():
            return np.asarray(jax.jit(lambda: run(), compiler_options=QUICK)())

    np.testing.assert_array_equal(result(), expected)
    monkeypatch.setattr(module, name, broken)
    assert not np.array_equal(result(), expected)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (262145, {"k": 17}, "scores has 262145 tokens; the kernel has room for at most 262144"),
        (262144, {"k": 140001}, "k=140001 leaves 140000 slots to choose; the kernel has room for at most 131072"),
        (1000, {"k": 17, "pool": 257}, "pool=257 is wider than the kernel's shifts reach; it takes at most 255 slots"),
    ],
)
def test_what_the_kernels_have_no_room_for_is_declined(tokens, options, message):
    scores, lengths = jax.ShapeDtypeStruct((1, 1, tokens), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    select = functools.partial(select_tokens, implementation="pallas_tpu", **options)
    with in_interpreter(), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(select, scores, lengths)
