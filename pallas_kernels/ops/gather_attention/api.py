"""Attention of one query step straight over a selection of the cache."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_positions, check_query
from pallas_kernels.ops import on_divided
from pallas_kernels.ops.gather_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.gather_attention,
    "xla": xla.gather_attention,
    "pallas_tpu": pallas_tpu.gather_attention,
    "divided": on_divided.gather_attention,
}


def gather_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    positions: Int[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query_heads head_dim"]:
    """Attend the slots at `positions`, as `gather_selection` and then `selection_attention` would.

    For a selection that is used once; one that lives for several steps is better gathered into a compact
    buffer.

    Args:
        q: the query of the present step.
        cache: the full cache; slots that are not selected may hold any key and any finite value.
        positions: slots to attend, per kv head or one list for all of them (`heads` is kv_heads or 1), in any order;
            -1 is an empty entry. A slot named twice counts twice.
        layer: which layer of the cache.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        implementation: see the package.

    Returns:
        The output in the dtype of q; zeros for the query heads of a kv head whose entries are all empty.

    Raises:
        ValueError: shapes do not fit, a position out of range (seen outside a trace only), unknown
            `implementation`.
    """
    check_cache(cache, layer)
    check_query(q, cache, q_rank=3)
    check_positions(positions, cache, shared=True)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.run(
        "gather_attention", IMPLEMENTATIONS, implementation, q, cache, positions, layer=layer, scale=scale
    )
