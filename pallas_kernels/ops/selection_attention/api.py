"""Attention of one query step over a compact buffer."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_query
from pallas_kernels.ops.selection_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.selection_attention,
    "xla": xla.selection_attention,
    "pallas_tpu": pallas_tpu.selection_attention,
}


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query_heads head_dim"]:
    """Attend the valid entries of a selection; their order does not matter.

    Args:
        q: the query of the present step.
        selection: the compact buffer, with a slot per entry. Entries that are not valid may hold any key and any
            finite value.
        valid: which entries hold a token, per kv head, or one row for all of them.
        layer: which layer of the selection.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        implementation: see the package.

    Returns:
        The output in the dtype of q; zeros for the query heads of a kv head without a valid entry.

    Raises:
        ValueError: shapes do not fit, unknown `implementation`.
    """
    check_cache(selection, layer, name="selection")
    check_query(q, selection, q_rank=3, name="selection")
    expected = (selection.batch, selection.kv_heads, selection.capacity)
    if valid.shape not in (expected, (expected[0], 1, expected[2])):
        raise ValueError(f"valid has shape {valid.shape}; expected {expected}, from selection, or one head for all")
    return dispatch.run(
        "selection_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        selection,
        valid,
        layer=layer,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
