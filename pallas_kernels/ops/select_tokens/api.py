"""From scores to a selection: the slots a recycled step may read."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.checks import check_shape, check_values
from pallas_kernels.ops.select_tokens import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.select_tokens,
    "xla": xla.select_tokens,
}


def select_tokens(
    scores: Float[Array, "batch kv_heads tokens"],
    lengths: Int[Array, " batch"],
    *,
    k: int,
    pool: int = 1,
    sinks: int = 0,
    implementation: str | None = None,
) -> Int[Array, "batch kv_heads {k}"]:
    """The k slots to keep, per row and kv head: self, the sinks, and the strongest others, weakest first.

    The present token ("self", slot `length - 1`) and the first `sinks` slots are always kept and count in k.
    All other slots below self are candidates; each is as strong as the largest score within `pool // 2`
    candidates of it. The order is the order of eviction: overwriting entries from the front drops the weakest
    first, and among equals the later slot.

        entries 0 to k-sinks-2     -1 if empty, then the chosen candidates, weakest to strongest
        entry   k-sinks-1          self
        entries k-sinks to k-1     slots 0 to sinks-1

    Source: RefreshKV (arXiv 2411.05787), how its compact buffer is rebuilt; forced self and sinks are ours.

    Args:
        scores: any finite numbers in the first `lengths[b]` slots of row b; padding may hold anything.
        lengths: slots in use per row, 0 to tokens, self included.
        k: slots in a selection, at least `sinks + 1`; may exceed tokens.
        pool: window of the maximum, in slots, odd; 1 means none. It never reaches self or a sink.
        sinks: how many of the first slots are always kept.
        implementation: see the package.

    Returns:
        Slots, int32, unique within a head, with -1 for empty: entries before the weakest candidate if there
        are too few, sinks not yet in use, and self's entry if self is itself a sink (it then stands only
        among the sinks).

    Raises:
        ValueError: shapes do not fit; `lengths`, `k`, `pool` or `sinks` out of range; unknown
            `implementation`.
    """
    if scores.ndim != 3:
        raise ValueError(f"scores has shape {scores.shape}; expected [batch, kv_heads, tokens]")
    check_shape("lengths", lengths, scores.shape[:1], "the batch of scores")
    check_values("lengths", lengths, 0, scores.shape[2])
    if sinks < 0:
        raise ValueError(f"{sinks=} is negative; expected 0 or more slots")
    if k < sinks + 1:
        raise ValueError(f"{k=} is below sinks + self = {sinks + 1}; raise k or keep fewer sinks")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"{pool=} is not an odd number of slots; expected 1 (no pooling), 3, 5, ...")
    return dispatch.run("select_tokens", IMPLEMENTATIONS, implementation, scores, lengths, k=k, pool=pool, sinks=sinks)
