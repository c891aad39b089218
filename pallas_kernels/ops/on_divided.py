"""Operations on a cache whose slots are divided over a mesh axis, in XLA: each part on its own, then merged."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.divided import Divided, first_slot, visible_slots
from pallas_kernels.mesh import EVERYWHERE, SLOTS, on_parts, parts, rows_and_heads, rows_only
from pallas_kernels.ops.gather_selection.xla import gather_positions
from pallas_kernels.ops.one_query import reduce_group, softmax_weights, weighted_values
from pallas_kernels.ops.prefill_attention.xla import prefill_attention as prefill_part
from pallas_kernels.ops.verify_attention.xla import verify_attention as verify_part


def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: Divided,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch heads capacity"] | None]:
    """The scores stay divided as the slots are."""

    def in_part(q: Array, part: KVCache, lengths: Array, layer: Array):
        weights, total = softmax_weights(q, part.keys(layer), visible_slots(part, lengths), scale, SLOTS)
        out = weighted_values(weights, total, part.values(layer), SLOTS).astype(q.dtype)
        return out, reduce_group(weights / total, group_reduction) if return_scores else None

    heads = rows_and_heads(q)
    specs = (heads, cache.spec, rows_only(lengths), EVERYWHERE)
    scores = PartitionSpec(*heads[:2], SLOTS) if return_scores else None
    return on_parts(in_part, (q, cache.whole, lengths, layer), specs, (heads, scores))


def token_scores(
    q: Float[Array, "batch query_heads head_dim"],
    cache: Divided,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    group_reduction: str,
) -> Float[Array, "batch heads capacity"]:
    """They stay divided as the slots are."""

    def in_part(q: Array, part: KVCache, lengths: Array, layer: Array):
        weights, total = softmax_weights(q, part.keys(layer), visible_slots(part, lengths), scale, SLOTS)
        return reduce_group(weights / total, group_reduction)

    heads = rows_and_heads(q)
    specs = (heads, cache.spec, rows_only(lengths), EVERYWHERE)
    return on_parts(in_part, (q, cache.whole, lengths, layer), specs, PartitionSpec(*heads[:2], SLOTS))


def gather_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: Divided,
    positions: Int[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads head_dim"]:
    """Every part attends those of the selected slots that it has."""

    def in_part(q: Array, part: KVCache, positions: Array, layer: Array):
        local = positions - first_slot(part)
        local = jnp.where((local >= 0) & (local < part.capacity) & (positions >= 0), local, -1)
        local = jnp.broadcast_to(local, (part.batch, part.kv_heads, local.shape[2]))
        k, v = gather_positions(part, layer, local)
        weights, total = softmax_weights(q, k, local >= 0, scale, SLOTS)
        return weighted_values(weights, total, v, SLOTS).astype(q.dtype)

    heads = rows_and_heads(q)
    specs = (heads, cache.spec, rows_and_heads(positions), EVERYWHERE)
    return on_parts(in_part, (q, cache.whole, positions, layer), specs, heads)


def prefill_attention(
    q: Float[Array, "batch query_heads chunk head_dim"],
    cache: Divided,
    start: int | Int[Array, ""] | Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads chunk head_dim"]:
    """Every part has all queries of the chunk and its own slots."""

    def in_part(q: Array, part: KVCache, start: Array, layer: Array):
        return prefill_part(q, part, start, layer=layer, scale=scale, first_slot=first_slot(part), parts=SLOTS)

    heads, start = rows_and_heads(q), jnp.asarray(start)
    specs = (heads, cache.spec, rows_only(start), EVERYWHERE)
    return on_parts(in_part, (q, cache.whole, start, layer), specs, heads)


def verify_attention(
    q: Float[Array, "batch query_heads steps head_dim"],
    cache: Divided,
    start: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
) -> tuple[Float[Array, "batch query_heads steps head_dim"], Float[Array, "batch heads steps capacity"] | None]:
    """Every part has all queries and its own slots; the scores stay divided as these are."""
    options = {"scale": scale, "return_scores": return_scores, "group_reduction": group_reduction}

    def in_part(q: Array, part: KVCache, start: Array, layer: Array):
        return verify_part(q, part, start, layer=layer, first_slot=first_slot(part), parts=SLOTS, **options)

    heads = rows_and_heads(q)
    specs = (heads, cache.spec, rows_only(start), EVERYWHERE)
    scores = PartitionSpec(*heads[:2], None, SLOTS) if return_scores else None
    return on_parts(in_part, (q, cache.whole, start, layer), specs, (heads, scores))


def top_k(strength: Float[Array, "batch heads tokens"], k: int) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """`lax.top_k` of what is divided over tokens: of each part's own, which is all that travels.

    Equals come in the order of their tokens, as with `lax.top_k`: parts stand in that order, too.
    """

    def in_part(strength: Array):
        tokens = strength.shape[-1]
        best, chosen = lax.top_k(strength, min(k, tokens))
        chosen += lax.axis_index(SLOTS) * tokens
        best, chosen = (lax.all_gather(x, SLOTS, axis=-1, tiled=True) for x in (best, chosen))
        best, place = lax.top_k(best, k)
        return best, jnp.take_along_axis(chosen, place, axis=-1)

    everywhere = rows_and_heads(strength)
    divided = rows_and_heads(strength, SLOTS)
    return on_parts(in_part, (strength,), (divided,), (everywhere, everywhere))


def is_divided(strength: jax.Array) -> bool:
    """Whether the tokens of scores lie on several devices."""
    return parts() > 1 and strength.shape[-1] % parts() == 0
