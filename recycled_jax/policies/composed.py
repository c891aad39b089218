"""Any scorer with any selector under any schedule."""

from typing import Any

from recycled_jax.frame import Method, Recycling, RefreshAttention, RowRule, Scorer, Selecting, Selector, TopK
from recycled_jax.policies.less_is_more import QueryHeadScorer
from recycled_jax.policies.pages_and_tokens import PagesOfSlots, SlotsOfPages
from recycled_jax.policies.parts import SCHEDULES, SCORERS, SELECTORS, make_layers, make_part
from recycled_jax.policies.policy import Policy

_SCORER, _SELECTOR, _SCHEDULE = {"name": "attention"}, {"name": "top-k", "k": 1024}, {"name": "fixed", "stride": 10}


def composed(
    scorer: dict[str, Any] = _SCORER,
    selector: dict[str, Any] = _SELECTOR,
    schedule: dict[str, Any] = _SCHEDULE,
    layers: dict[str, Any] | None = None,
    refresh: RefreshAttention = "selection",
    rows: RowRule = "per_row",
    correct_every: int | None = None,
) -> Policy:
    """A scorer, a selector and a schedule of your own choice, each by its name and fields, and the layers that read
    everything (`dense`) or select for those above them (`select`; default: every layer for itself). Scores of pages
    serve selectors of slots and the other way round."""
    chosen: Selector = make_part("selector", SELECTORS, selector)
    fitting = _fit(make_part("scorer", SCORERS, scorer), chosen)
    if isinstance(fitting, QueryHeadScorer) and not (isinstance(chosen, TopK) and chosen.shared):
        raise ValueError("policy.scorer.name='query-heads' scores every query head; set policy.selector.shared")
    when, plan = make_part("schedule", SCHEDULES, schedule), make_layers(layers or {})
    if when is None:
        if isinstance(chosen, TopK) and chosen.tail:
            raise ValueError(f"policy.selector.tail={chosen.tail} has no use where every step selects; leave it out")
        method: Method = Selecting(fitting, chosen, plan, refresh)
    elif not isinstance(chosen, TopK):
        raise ValueError(
            f"policy.selector.name={selector['name']!r} gives no order of eviction, which selections kept over steps "
            "need; use 'top-k', or the schedule 'every-step'"
        )
    else:
        method = Recycling(fitting, chosen, when, refresh, rows, plan)
    return Policy("composed", method, correct_every=correct_every)


def _fit(scorer: Scorer, selector: Selector) -> Scorer:
    """The scorer, with scores of what the selector selects."""
    if scorer.unit == selector.unit:
        return scorer
    if selector.unit == 1:
        return SlotsOfPages(scorer, scorer.unit)
    if scorer.unit == 1:
        return PagesOfSlots(scorer, selector.unit)
    raise ValueError(
        f"policy.scorer.page={scorer.unit} and policy.selector.page={selector.unit} differ; expected equal pages"
    )
