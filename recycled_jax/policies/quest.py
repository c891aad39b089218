"""Quest: pages of slots, ranked by the largest product with the query that their keys could have."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from pallas_kernels import page_bounds, page_scores, update_page_bounds
from recycled_jax.frame import GroupReduction, LayerPlan, Scorer, Selecting, TopPages
from recycled_jax.frame.scorers import check_group_reduction
from recycled_jax.policies.policy import Policy

FEWEST_PAGES = 3  # of the released evaluation


@dataclass(frozen=True)
class PageBoundScorer(Scorer):
    """For every page an upper bound on the logits of its slots, reduced over the query heads of a kv head. Kept are the
    smallest and the largest key of every page, elementwise: 2 / `page` of the bytes of the keys.

    Logits and not probabilities, since a bound is one on logits: the group reduction compares heads by them.
    """

    page: int = 16
    group_reduction: GroupReduction = "sum"

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ValueError(f"page={self.page} must be at least 1 slot")
        check_group_reduction(self.group_reduction)

    @property
    def unit(self):
        return self.page

    def begin(self, prefilled, *, implementation):
        cache, lengths = prefilled.cache, prefilled.prompts.lengths

        def of_layer(layer, bounds):
            return page_bounds(cache, lengths, bounds, layer=layer, page_size=self.page)

        pages = -(-cache.capacity // self.page)
        return lax.fori_loop(0, cache.layers, of_layer, cache.empty_like(capacity=pages))

    def append(self, state, token, here):
        past_the_end = state.capacity * self.page
        slots = jnp.where(here.active, here.lengths - 1, past_the_end)
        return update_page_bounds(state, slots, token.k, layer=here.layer, page_size=self.page)

    def score(self, token, cache, state, here):
        return page_scores(
            token.q, state, here.lengths, page_size=self.page, group_reduction=self.group_reduction, **here.to_op
        )

    def reads(self, lengths, cache):
        return 2.0 * -(-lengths // self.page)


def quest(
    k: int = 1024,
    page: int = 16,
    group_reduction: GroupReduction = "sum",
    dense_layers: tuple[int, ...] = (0, 1),
) -> Policy:
    """Quest: every step attends the newest page and the best others of `page` slots, `k` slots in all, rounded down to
    pages; a page is as good as the largest logit its keys could have (Tang et al., arXiv 2406.10774; one selection per
    kv head, from the sum over its query heads, as in sparse-frontier)."""
    scorer = PageBoundScorer(page, group_reduction)
    if k < FEWEST_PAGES * page:
        raise ValueError(f"k={k} is below {FEWEST_PAGES} pages of {page} slots: raise k or make pages smaller")
    return Policy("quest", Selecting(scorer, TopPages(k, page), LayerPlan(dense=dense_layers)))
