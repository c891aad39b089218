"""From scores to a selection: the slots a recycled step may read."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.checks import check_shape, check_values
from pallas_kernels.ops.select_tokens import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.select_tokens,
    "xla": xla.select_tokens,
    "pallas_tpu": pallas_tpu.select_tokens,
}
SHARED = (None, "max", "sum", "union")


def select_tokens(
    scores: Float[Array, "batch kv_heads tokens"],
    lengths: Int[Array, " batch"],
    *,
    k: int,
    pool: int = 1,
    sinks: int = 0,
    recent: int = 1,
    shared: str | None = None,
    ordered: bool = True,
    recall: float = 1.0,
    implementation: str | None = None,
) -> Int[Array, "batch selections {k}"]:
    """The k slots to keep, per row and kv head: the newest, the sinks, and the strongest others, weakest first.

    The newest `recent` slots (the present token, "self", is slot `length - 1`) and the first `sinks` slots are
    always kept and count in k. All slots between them are candidates; each is as strong as the largest score
    within `pool // 2` candidates of it. The order is the order of eviction: overwriting entries from the front
    drops the weakest first, and among equals the later slot.

        entries 0 to k-sinks-recent-1          -1 if empty, then the chosen candidates, weakest to strongest
        entries k-sinks-recent to k-sinks-1    the recent window, oldest to self
        entries k-sinks to k-1                 slots 0 to sinks-1

    One selection can be `shared` by the kv heads, so that whole tokens are fetched. "max" and "sum" give a
    candidate the largest or the sum of its strengths over the heads (in float32, held within its finite range).
    "union" goes by rank: all heads' first choices in the order of the heads, then all second choices and so on;
    a slot counts where it comes up first, and the sooner the stronger.

    Sources: RefreshKV (arXiv 2411.05787), how its compact buffer is rebuilt; TokenSelect (arXiv 2411.02886), the
    sum; LessIsMore (arXiv 2508.07101), the union and the recent window; forced self and sinks are ours.

    Args:
        scores: any finite numbers in the first `lengths[b]` slots of row b; padding may hold anything.
        lengths: slots in use per row, 0 to tokens, self included.
        k: slots in a selection, at least `sinks + recent`; may exceed tokens.
        pool: window of the maximum, in slots, odd; 1 means none. It never reaches a recent slot or a sink.
        sinks: how many of the first slots are always kept.
        recent: how many of the newest slots are always kept, self included; at least 1.
        shared: None for one selection per kv head, or the rule for one that all heads share.
        ordered: False lets the candidates' entries stand in any order, empty ones among them: attention does not
            care, and it is cheaper on TPU.
        recall: the expected share of the true candidates among those chosen. 1 is exact; below 1 "xla" uses
            `jax.lax.approx_max_k` (for union, in the heads' own lists), which is approximate on TPU only, and
            among equals it may choose any. The other implementations are always exact.
        implementation: see the package.

    Returns:
        Slots, int32, unique within a selection, with -1 for empty: entries before the weakest candidate if there
        are too few, sinks and recent slots not yet in use, and the recent slots that are themselves sinks (those
        stand only among the sinks). `selections` is kv_heads, or 1 if `shared`.

    Raises:
        ValueError: shapes do not fit; `lengths`, `k`, `pool`, `sinks`, `recent` or `recall` out of range; unknown
            `shared` or `implementation`.
        NotImplementedError: "pallas_tpu" with more than 262144 tokens, 131072 candidates to choose, or `pool` of 255.
    """
    if scores.ndim != 3:
        raise ValueError(f"scores has shape {scores.shape}; expected [batch, kv_heads, tokens]")
    check_shape("lengths", lengths, scores.shape[:1], "the batch of scores")
    check_values("lengths", lengths, 0, scores.shape[2])
    if sinks < 0:
        raise ValueError(f"{sinks=} is negative; expected 0 or more slots")
    if recent < 1:
        raise ValueError(f"{recent=} leaves out self; expected 1 or more slots")
    if k < sinks + recent:
        window = "self" if recent == 1 else "recent"
        raise ValueError(f"{k=} is below sinks + {window} = {sinks + recent}; raise k or always keep fewer")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"{pool=} is not an odd number of slots; expected 1 (no pooling), 3, 5, ...")
    if shared not in SHARED:
        raise ValueError(f"{shared=} is not known; expected one of: {', '.join(map(str, SHARED))}")
    if not 0 < recall <= 1:
        raise ValueError(f"{recall=} is not a share of the candidates; expected above 0, to 1 (exact)")
    options = dict(k=k, pool=pool, sinks=sinks, recent=recent, shared=shared, ordered=ordered, recall=recall)
    return dispatch.run("select_tokens", IMPLEMENTATIONS, implementation, scores, lengths, **options)
