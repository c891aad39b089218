"""What finished runs are called where they stand beside each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eval.finished.run import Bench, Run, flat


def families(runs: Sequence[Run]) -> list[str]:
    """A name for each run's policy without its budget: runs that differ in the budget alone share it. Knobs are told
    only where there are two of a name and a budget."""
    names = ["full (dense)" if run.config.dense else str(run.config.policy["name"]) for run in runs]
    result = []
    for run, name in zip(runs, names, strict=True):
        alike = [other for other, its in zip(runs, names, strict=True) if its == name]
        twice = max(Counter(other.config.k for other in alike).values()) > 1
        result.append(", ".join([name, *(_differing(run, alike) if twice else [])]))
    return result


def labels(runs: Sequence[Run]) -> list[str]:
    """A distinct name for each run: policy, budget, and what else it takes."""
    result = []
    for run, family in zip(runs, families(runs), strict=True):
        result.append(family if run.config.k is None else f"{family}, k {run.config.k}")
    if len({run.config.model.get("name") for run in runs}) > 1:
        result = [f"{run.config.model.get('name')}: {label}" for run, label in zip(runs, result, strict=True)]
    count = Counter(result)
    return [
        label if count[label] == 1 else f"{label} ({run.config.hash or run.path.name})"
        for run, label in zip(runs, result, strict=True)
    ]


def bench_label(one: Bench, run: Run, label: str) -> str:
    """The run's own label, but for records of another policy."""
    if flat(one.policy) == flat(run.config.policy):
        return label
    return ", ".join([str(one.policy["name"]), *knobs(one.policy)])


def knobs(policy: Mapping[str, Any]) -> list[str]:
    """All that a policy was told, but its name."""
    return [f"{name} {value}" for name, value in flat(policy).items() if name != "name"]


def _differing(run: Run, alike: Sequence[Run]) -> list[str]:
    told = [
        flat(other.config.policy) | {"mode": other.config.mode, "question": other.config.question} for other in alike
    ]
    own = flat(run.config.policy) | {"mode": run.config.mode, "question": run.config.question}
    names = [name for name in own if name.split(".")[-1] != "k" and len({str(t.get(name)) for t in told}) > 1]
    return [f"{name} {own[name]}" for name in names]
