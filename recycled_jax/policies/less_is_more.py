"""LessIsMore: TidalDecode's layers, one selection for all heads, and a share of it for the latest tokens."""

from dataclasses import dataclass

from pallas_kernels import decode_attention, token_scores
from recycled_jax.frame import LayerPlan, RefreshAttention, Scorer, Selecting, TopK
from recycled_jax.policies.policy import Policy


@dataclass(frozen=True)
class QueryHeadScorer(Scorer):
    """The softmax probability of each slot for every query head, for selectors that go by each head's own order."""

    def score(self, token, cache, state, here):
        return token_scores(token.q, cache, here.lengths, group_reduction="none", **here.to_op)

    def score_and_attend(self, token, cache, state, here):
        attended, scores = decode_attention(
            token.q, cache, here.lengths, return_scores=True, group_reduction="none", **here.to_op
        )
        return scores, attended


def less_is_more(
    k: int = 2048,
    dense_layers: tuple[int, ...] = (0, 1),
    selection_layers: tuple[int, ...] = (2, 13),
    recent_ratio: float = 0.25,
    sinks: int = 4,
    attends: RefreshAttention = "full",
    correct_every: int | None = None,
) -> Policy:
    """LessIsMore: as `tidal`, with one selection for all heads, in which every query head's first choices come before
    any head's second ones; `recent_ratio` of `k` goes to the sinks and the latest tokens (Yang et al., arXiv
    2508.07101). The second selection layer depends on the model: 12 for Qwen3-8B, 20 for Qwen3-4B in the authors'
    scripts. The sinks are the scripts', not the paper's."""
    selector = TopK(k, sinks=sinks, recent=recent_window(k, recent_ratio, sinks), shared="union")
    method = Selecting(QueryHeadScorer(), selector, LayerPlan(tuple(dense_layers), tuple(selection_layers)), attends)
    return Policy("less-is-more", method, correct_every=correct_every)


def recent_window(k: int, recent_ratio: float, sinks: int) -> int:
    """Slots for the latest tokens: that share of `k`, less the sinks, and at least the present token (ours).

    Raises ValueError for a ratio outside 0 to 1.
    """
    if not 0 <= recent_ratio <= 1:
        raise ValueError(f"recent_ratio={recent_ratio} must be between 0 and 1, a share of k")
    return max(1, round(recent_ratio * k) - sinks)
