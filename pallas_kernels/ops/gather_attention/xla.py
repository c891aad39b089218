"""gather_attention in XLA: the selection is gathered into a temporary buffer and attended there."""

from jaxtyping import Array, Float, Int

from pallas_kernels.ops.gather_selection.xla import gather_selection
from pallas_kernels.ops.selection_attention.xla import selection_attention


def gather_attention(
    q: Float[Array, "batch query_heads head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    positions: Int[Array, "batch kv_heads budget"],
    *,
    scale: float,
) -> Float[Array, "batch query_heads head_dim"]:
    k_sel, v_sel = gather_selection(k, v, positions)
    return selection_attention(q, k_sel, v_sel, positions >= 0, scale=scale)
