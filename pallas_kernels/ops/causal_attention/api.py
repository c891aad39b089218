"""Causal self-attention of a whole sequence, for training and for parity."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.checks import check_sequences
from pallas_kernels.ops.causal_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.causal_attention,
    "xla": xla.causal_attention,
    "pallas_tpu": pallas_tpu.causal_attention,
}


def causal_attention(
    q: Float[Array, "batch query_heads tokens head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query_heads tokens head_dim"]:
    """Every token attends itself and all tokens before it; differentiable in q, k and v.

    Padding at the end of a row cannot be seen by the tokens before it, so ragged rows need no lengths; what
    comes out at padding is to be ignored. Memory beside arguments and result: a sixteenth of the tokens x
    tokens logits at a time in `xla`, forward and backward; all of them in `reference`; none in `pallas_tpu`,
    JAX's splash attention, which when differentiated writes 512 bytes per token and query head beside its output.

    Args:
        q: queries of the whole sequence.
        k: its keys.
        v: its values.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        implementation: see the package.

    Returns:
        The output, in shape and dtype like q.

    Raises:
        ValueError: shapes do not fit, unknown `implementation`.
    """
    check_sequences(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} tokens and k has {k.shape[2]}; expected as many queries as keys")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.run("causal_attention", IMPLEMENTATIONS, implementation, q, k, v, scale=scale)
