"""Generation with an int8 cache."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import Int8HeadMajor
from recycled_jax.generate import generate, read
from recycled_jax.policies import make_policy
from recycled_jax.state import model_cache
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

STEPS = 12
# Those that read the cache in ways of their own, beside the dense one and the recycled one.
POLICIES = {
    "streaming": {"k": 16},
    "quest": {"k": 24, "page": 8, "dense_layers": ()},
    "token-select": {"k": 16, "sinks": 2, "recent": 4, "max_stride": 4},
    "infllm": {"k": 32, "block": 4, "sinks": 4, "recent": 8},
    "recycled-tidal": {"k": 16, "dense_layers": (0,), "selection_layers": (1,)},
}


def run(policy, **options):
    model, params = tiny_model()
    return generate(model, params, prompts(37, 20), policy=policy, max_new_tokens=STEPS, chunk=16, **options)


def test_recycling_everything_is_attending_everything():
    """The compact buffer has the rounded tokens of the cache, those of recycled steps included."""
    full = run(make_policy("full"), cache_dtype="int8")
    recycled = run(make_policy("recycled", k=64, stride=5), cache_dtype="int8")
    assert recycled.telemetry.refreshes().max() > 0 and recycled.telemetry.effective_stride().min() > 4
    assert recycled.tokens == full.tokens
    np.testing.assert_allclose(recycled.log_probs, full.log_probs, atol=1e-5)


def test_the_cache_alone_is_rounded():
    exact, rounded = run(make_policy("full")), run(make_policy("full"), cache_dtype="int8")
    first, same = np.array(exact.log_probs)[:, 0], np.array(rounded.log_probs)[:, 0]
    assert 0 < np.abs(first - same).max() < 0.1


@pytest.mark.parametrize("name", POLICIES)
def test_policies_decode_from_it(name):
    done = run(make_policy(name, **POLICIES[name]), cache_dtype="int8")
    assert [len(row) for row in done.tokens] == [STEPS] * 2
    assert np.isfinite(done.log_probs).all()


def test_prompts_are_read_into_it():
    model, params = tiny_model()
    prefilled = read(model, params, prompts(37, 20), max_new_tokens=STEPS, chunk=16, cache_dtype="int8")
    exact = read(model, params, prompts(37, 20), max_new_tokens=STEPS, chunk=16)
    assert isinstance(prefilled.cache, Int8HeadMajor)
    k = np.asarray(exact.cache.keys(0))
    half_a_step = np.abs(k).max(axis=-1, keepdims=True) / 254
    moved = np.abs(np.asarray(prefilled.cache.keys(0)) - k)  # the lowest layer's: others read rounded ones
    assert np.all(moved <= 1.001 * half_a_step) and moved.max() > 0
    with pytest.raises(ValueError, match="cache_dtype='int8' belongs to prompts that are still to be read"):
        generate(model, params, prefilled, policy=make_policy("full"), max_new_tokens=STEPS, cache_dtype="int8")


def test_bad_choices_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user has no annotation checks
    sizes = {"batch": 1, "capacity": 128, "dtype": jnp.float32, "implementation": None}
    with pytest.raises(ValueError, match="cache_dtype='int4' is not known; expected None or one of: int8"):
        model_cache(CONFIG, **sizes, cache_dtype="int4")  # pyright: ignore[reportArgumentType]
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="cache_dtype='int8' is not for a mesh that divides"):
        model_cache(CONFIG, **sizes, cache_dtype="int8")
