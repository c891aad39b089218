"""Which tokens of a draft stand, and which one follows them: pure rules over what the drafter and the model say.

Column i of a draft is judged by the model's column i, which has seen the draft's tokens before it; the model has one
column more, for the token after a draft of which everything stands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recycled_jax.sampling import Sampling, limited

_ROUNDING = 8  # units in the last place, of the larger of the two logits


def accept_greedy(
    drafted: Int[Array, "batch draft"], counts: Int[Array, " batch"], logits: Float[Array, "batch draft+1 vocab"]
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """How many of each row's first `counts` drafted tokens are the model's first choices, and its choice after them."""
    choices = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    accepted = _agreeing(drafted == choices[:, :-1], counts)
    return accepted, jnp.take_along_axis(choices, accepted[:, None], axis=1)[:, 0]


def accept_sampled(
    key: jax.Array,
    drafted: Int[Array, "batch draft"],
    counts: Int[Array, " batch"],
    draft: Float[Array, "batch draft vocab"],
    target: Float[Array, "batch draft+1 vocab"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """How many of each row's first `counts` tokens, drawn from the probabilities `draft`, stand for draws from
    `target`, and the token after them; each row draws by its place in the batch.

    A token stands with probability min(1, target / draft); in the place of the first that does not comes a draw from
    max(0, target - draft), normalised; after a draft that stands as a whole one from `target`. What comes out is
    distributed as draws from `target` alone (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
    """
    rows = jnp.arange(drafted.shape[0])
    keys = jax.vmap(jax.random.split)(jax.random.split(key, drafted.shape[0]))
    chance = jax.vmap(lambda key: jax.random.uniform(key, drafted.shape[1:]))(keys[:, 0])
    ours, theirs = (
        jnp.take_along_axis(of, drafted[..., None], axis=-1)[..., 0] for of in (target[:, : drafted.shape[1]], draft)
    )
    accepted = _agreeing(chance * theirs < ours, counts)
    wanted, offered = target[rows, accepted], jnp.pad(draft, ((0, 0), (0, 1), (0, 0)))[rows, accepted]
    missing = jnp.maximum(wanted - jnp.where((accepted < counts)[:, None], offered, 0.0), 0.0)
    # Where a token was refused by a rounding error, nothing may be missing.
    missing = jnp.where(jnp.sum(missing, axis=-1, keepdims=True) > 0, missing, wanted)
    return accepted, jax.vmap(jax.random.categorical)(keys[:, 1], jnp.log(missing)).astype(jnp.int32)


def probabilities(sampling: Sampling, logits: Float[Array, "*shape vocab"]) -> Float[Array, "*shape vocab"]:
    """Those with which `sampling.sample` draws, at a temperature above 0."""
    flat = logits.reshape(-1, logits.shape[-1]) / sampling.temperature
    return jax.nn.softmax(limited(sampling, flat), axis=-1).reshape(logits.shape)


def near_ties(logits: Float[Array, "*shape vocab"], dtype: jnp.dtype) -> Bool[Array, "*shape"]:
    """Whether the two largest logits, made by a model that computes in `dtype`, are so close that another order of the
    same sums may exchange them: less than 8 units of rounding (`finfo(dtype).eps`) of the larger, or of 1."""
    first, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
    unit = jnp.finfo(dtype).eps * jnp.maximum(jnp.abs(first), 1.0)
    return first - second < _ROUNDING * unit


def _agreeing(agrees: Bool[Array, "batch draft"], counts: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Columns before the first that does not agree, among the first `counts`."""
    agrees &= jnp.arange(agrees.shape[1])[None, :] < counts[:, None]
    return jnp.sum(jnp.cumprod(agrees, axis=1), axis=1, dtype=jnp.int32)
