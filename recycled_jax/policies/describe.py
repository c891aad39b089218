"""What the policies are: one source for `recycled policies`, for its explanation of one, and for docs/policies.md."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recycled_jax.flags import describe_type
from recycled_jax.frame import Axes, Dense, DensePrefill
from recycled_jax.named import knobs_of
from recycled_jax.policies.policy import Policy
from recycled_jax.policies.registry import POLICIES, make_policy
from recycled_jax.prefill.registry import PREFILLS

ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
# What a policy does, and the policies that do it: the first table of the page.
FAMILIES = {
    "recycles selections over steps, layers, both; per head from chunks": (
        "recycled",
        "recycled-dynamic",
        "recycled-v1",
        "tidal",
        "recycled-tidal",
        "long-heads",
    ),
    "evicts: memory falls too (`keep_cache: false`)": ("streaming", "h2o", "snapkv", "tova"),
    "selects at every step, or nearly": (
        "quest",
        "double-sparse",
        "token-select",
        "tactic",
        "squeezed",
        "infllm",
        "act-qkv",
        "attention-predictor",
        "less-is-more",
    ),
    "is for models trained with it (`model.cca` of `python -m train`)": ("cca",),
    "is a reference": ("full", "top-k", "top-p", "stale-top-k", "random"),
    "puts any scorer, selector and schedule together": ("composed",),
}
_HEAD = """# Policies

Made by `recycled policies --out docs/policies.md`; do not edit.

A policy is a scorer (what is relevant?), a selector (which slots?) and a schedule (when, and at which layer?). Each is
tested against an oracle in plain numpy, written from its paper. `recycled policies NAME` explains one.
[What each policy loses](policies_quality.md) has what each costs the embedded model,
[Adding a policy](adding_a_policy.md) how to add one, in a file and a line.

"""
_AXES = """
With `recycled`, new tokens displace the weakest of the selection between two refreshes. A refresh attends the whole
cache (`refresh: full`) or only the new selection (`refresh: selection`, which reads no other values). Rows of a batch
have their own lengths and decide for themselves (`rows: per_row`); decoded greedily, a row gives what it gives alone.

# Their axes

Every policy with its knobs at their defaults: name, axes, what it changes, and the paper. `composed` puts any scorer
together with any selector and schedule:

```yaml
policy:
  name: composed
  scorer: {name: page-bounds, page: 16}
  selector: {name: top-k, k: 1024, sinks: 4}
  schedule: {name: fixed, stride: 10}
  layers: {dense: [0, 1]}
```

"""

_PREFILL = """# Ways to read prompts

`--prefill NAME` goes with any policy; a policy that needs a way of its own brings it.
"""


@dataclass(frozen=True)
class Description:
    """A policy at its defaults, in words. `knobs`: type and default of each."""

    name: str
    text: str
    axes: Axes
    changes: tuple[str, ...]
    paper: str
    knobs: dict[str, tuple[Any, Any]]


def describe(name: str) -> Description:
    """Raises ValueError for an unknown name, with the nearest valid one."""
    policy, knobs = make_policy(name), knobs_of("policy", POLICIES, name)
    text = text_of(POLICIES[name])
    found = ARXIV.search(text)
    return Description(
        name, text, policy.method.axes, tuple(_changes(policy, knobs)), found[0] if found else "ours", knobs
    )


def _changes(policy: Policy, knobs: dict[str, Any]) -> Iterable[str]:
    if not isinstance(policy.method, Dense):
        yield "decode"
    if not isinstance(policy.prefill, DensePrefill):
        yield "prefill"
    if "keep_cache" in knobs:
        yield "memory, with keep_cache=False" if policy.method.keeps_cache else "memory"


def spell_knobs(knobs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """`k: int = 1024`, one for each knob."""
    return [
        f"{knob}: {describe_type(hint)} = {'none' if default is None else default}"
        for knob, (hint, default) in knobs.items()
    ]


def text_of(factory: Callable) -> str:
    """The docstring of a factory on one line."""
    return " ".join((inspect.getdoc(factory) or "").split())


def cells(description: Description) -> list[str]:
    """A line of the table."""
    changes = ", ".join(description.changes) or "nothing"
    return [description.name, *description.axes, changes, description.paper]


COLUMNS = ("policy", "scorer", "selector", "schedule", "changes", "paper")


def markdown() -> str:
    """docs/policies.md."""
    every = [describe(name) for name in POLICIES]
    head = _HEAD + _table(("a policy that", "names"), _families()) + _AXES
    parts = [head + _table(COLUMNS, [cells(description) for description in every])]
    for description in every:
        parts.append(_section(description.name, description.text, description.knobs))
    parts.append(_PREFILL)
    for name, factory in PREFILLS.items():
        parts.append(_section(f"prefill: {name}", text_of(factory), knobs_of("prefill", PREFILLS, name)))
    return "\n".join(parts)


def _families() -> list[tuple[str, str]]:
    """Rows of the first table, each name a link to its section; the last row has the ways to read prompts."""
    rows = [(does, ", ".join(f"[`{name}`](#{name})" for name in names)) for does, names in FAMILIES.items()]
    ways = ", ".join(f"[`{name}`](#prefill-{name})" for name in PREFILLS)
    return [*rows, ("reads prompts in one of these ways (`--prefill`)", ways)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ("---",) * len(header), *rows))


def _section(title: str, text: str, knobs: Mapping[str, tuple[Any, Any]]) -> str:
    spelled = "".join(f"- `{knob}`\n" for knob in spell_knobs(knobs))
    return f"## {title}\n\n{text}\n" + (f"\n{spelled}" if spelled else "")
