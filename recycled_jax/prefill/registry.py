"""The named ways to read prompts. A factory's signature is its knobs, its docstring what `recycled prefills` prints."""

from collections.abc import Callable

from recycled_jax.frame import DensePrefill, PrefillAttention
from recycled_jax.named import make
from recycled_jax.prefill.criti_prefill import criti_prefill
from recycled_jax.prefill.token_select import token_select
from recycled_jax.prefill.vertical_slash import vertical_slash


def dense() -> PrefillAttention:
    """Causal attention to everything."""
    return DensePrefill()


PREFILLS: dict[str, Callable[..., PrefillAttention]] = {
    "dense": dense,
    "vertical-slash": vertical_slash,
    "criti-prefill": criti_prefill,
    "token-select": token_select,
}


def make_prefill(name: str, **knobs: object) -> PrefillAttention:
    """The way to read prompts registered as `name` with its knobs set. Raises as `make`."""
    return make("prefill", PREFILLS, name, knobs)
