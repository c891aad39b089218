"""What the compiled decode program does with the cache: nothing but append to it and, on a refresh, read it."""

import re

import jax
import jax.numpy as jnp
import pytest

from recycled_jax.decode import prefill
from recycled_jax.generate import LoopState, read, run_block, start
from recycled_jax.policies import make_policy
from recycled_jax.sampling import Sampling
from tests.recycled_jax.random_model import prompts, tiny_model

CAPACITY = 640  # a number that no other dimension of the tiny model has
POLICIES = {
    "full": make_policy("full"),
    "recycled": make_policy("recycled", k=24, stride=4),
    "score-only": make_policy("recycled", k=24, stride=4, refresh="selection"),
    "dynamic": make_policy("recycled-dynamic", k=24, stride=4, threshold=0.9),
    "streaming": make_policy("streaming", k=24),
}


STATIC = ("model", "policy", "sampling", "steps", "stride", "coverage", "implementation")


def fresh_state(policy) -> LoopState:
    model, params = tiny_model()
    prefilled = read(model, params, prompts(20, 30), max_new_tokens=8, capacity=CAPACITY, chunk=32)
    options = {"policy": policy, "sampling": Sampling(), "implementation": None}
    return start(model, prefilled.cache, prefilled.prompts, jax.random.key(0), **options)[0]


def compile_block(policy, *, stride=None, donate=True):
    """The program of `run_block` and its state; leaves go in and out, because the shape annotations that tests check
    refuse the descriptions of arrays that lowering puts into a `DecodeState`."""
    model, params = tiny_model()
    state = fresh_state(policy)
    leaves, tree = jax.tree.flatten(state)

    def block(params, leaves, limit):
        state, block = run_block.__wrapped__(
            model,
            params,
            jax.tree.unflatten(tree, leaves),
            limit,
            policy=policy,
            sampling=Sampling(),
            steps=8,
            stride=stride,
            coverage=False,
            implementation=None,
        )
        return jax.tree.leaves(state), jax.tree.leaves(block)

    return jax.jit(block, donate_argnums=(1,) if donate else ()).lower(params, leaves, jnp.int32(8)).compile(), state


def cache_shape(state: LoopState) -> str:
    return "f32[" + ",".join(map(str, state.decode.cache.k.shape)) + "]"


def cache_copies(compiled, state: LoopState) -> list[str]:
    lines = compiled.as_text().splitlines()
    return [line for line in lines if re.search(r" copy(-start)?\(", line) and cache_shape(state) in line]


def cache_bytes(state: LoopState) -> int:
    return 2 * state.decode.cache.k.size * state.decode.cache.k.dtype.itemsize


@pytest.mark.parametrize(
    ("name", "stride"), [*((name, None) for name in POLICIES), ("recycled", 4)], ids=lambda value: str(value)
)
def test_cache_is_donated_and_never_copied(name, stride):
    compiled, state = compile_block(POLICIES[name], stride=stride)
    assert cache_shape(state) in compiled.as_text()
    assert not cache_copies(compiled, state)
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes(state)
    # all temporaries together are smaller than the cache: no second one hides under another shape
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes(state)


def test_the_check_sees_a_copy():
    # without donation the loop must copy what it updates
    compiled, state = compile_block(POLICIES["full"], donate=False)
    assert cache_copies(compiled, state)


def test_generation_donates_its_state():
    model, params = tiny_model()
    state = fresh_state(POLICIES["recycled"])
    run_block(
        model,
        params,
        state,
        jnp.int32(8),
        policy=POLICIES["recycled"],
        sampling=Sampling(),
        steps=8,
        stride=None,
        coverage=False,
        implementation=None,
    )
    assert state.decode.cache.k.is_deleted() and state.decode.kept.selection.compact.k.is_deleted()


def test_prefill_holds_no_square_of_the_prompt():
    model, params = tiny_model()

    def temporaries(length: int) -> int:
        lowered = jax.jit(
            lambda params, tokens, lengths: prefill(
                model, params, tokens, lengths, policy=POLICIES["recycled"], capacity=length, chunk=128
            )
        ).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # four times the prompt: a square would take sixteen times the memory
    assert temporaries(8192) < 5 * temporaries(2048)
