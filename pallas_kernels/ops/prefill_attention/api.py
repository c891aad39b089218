"""Attention of a chunk of a prompt over everything up to it in the cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_query, check_shape, check_values
from pallas_kernels.ops import on_divided
from pallas_kernels.ops.prefill_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.prefill_attention,
    "xla": xla.prefill_attention,
    "pallas_tpu": pallas_tpu.prefill_attention,
    "divided": on_divided.prefill_attention,
}


def prefill_attention(
    q: Float[Array, "batch query_heads chunk head_dim"],
    cache: KVCache,
    start: int | Int[Array, ""] | Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query_heads chunk head_dim"]:
    """Causal attention of the queries that stand at slots `start` to `start + chunk - 1`; forward only
    (`causal_attention` is the differentiable form, for whole sequences).

    The chunk's own keys and values are already in the cache. Query row c sees slots 0 to `start + c`, so work
    grows with `start + chunk`, not with the size of the cache. Memory beside the arguments: a few blocks of
    `chunk` x 512 logits per query head in `xla`, the whole `chunk` x tokens in `reference`.

    Args:
        q: the queries of the chunk.
        cache: the full cache; slots from `start + chunk` on may hold any key and any finite value.
        start: slot of the first query, 0 to capacity - chunk, the same for all rows or (not by "pallas_tpu") one per
            row; may be traced.
        layer: which layer of the cache.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        implementation: see the package.

    Returns:
        The output, in shape and dtype like q.

    Raises:
        ValueError: shapes do not fit, `start` out of range (seen outside a trace only), unknown
            `implementation`.
    """
    check_cache(cache, layer)
    check_query(q, cache, q_rank=4)
    chunk = q.shape[2]
    if chunk > cache.capacity:
        raise ValueError(f"q has {chunk} tokens and cache has {cache.capacity} slots; expected a chunk that fits in it")
    if jnp.ndim(start):
        check_shape("start", jnp.asarray(start), q.shape[:1], "the batch of q")
    check_values("start", start, 0, cache.capacity - chunk)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.run("prefill_attention", IMPLEMENTATIONS, implementation, q, cache, start, layer=layer, scale=scale)
