"""Attention of one query step over a compact buffer."""

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.checks import check_heads, check_shape
from pallas_kernels.ops.selection_attention import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.selection_attention,
    "xla": xla.selection_attention,
}


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    k_sel: Float[Array, "batch kv_heads budget head_dim"],
    v_sel: Float[Array, "batch kv_heads budget head_dim"],
    valid: Bool[Array, "batch kv_heads budget"],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query_heads head_dim"]:
    """Attend the valid entries of a selection; their order does not matter.

    Args:
        q: the query of the present step.
        k_sel, v_sel: the compact buffer. Entries that are not valid may hold any key and any finite value.
        valid: which entries hold a token.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        implementation: see the package.

    Returns:
        The output in the dtype of q; zeros for the query heads of a kv head without a valid entry.

    Raises:
        ValueError: shapes do not fit, unknown `implementation`.
    """
    check_heads(q, k_sel, v_sel, q_rank=3, names=("k_sel", "v_sel"))
    check_shape("valid", valid, k_sel.shape[:3], "k_sel")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.run("selection_attention", IMPLEMENTATIONS, implementation, q, k_sel, v_sel, valid, scale=scale)
