"""The table of what each run was told to do, where it ran, and with what."""

from collections.abc import Sequence

from eval.finished.names import knobs, labels
from eval.finished.run import Run, flat
from eval.finished.text import NONE
from eval.report.content import Table

_TOLD_APART = ("schema", "hash", "model", "policy", "mode", "question")


def settings_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        model, values = run.config.model, run.config.values
        others = {name: value for name, value in values.items() if name not in _TOLD_APART}
        batches = dict.fromkeys(str(one["batch"]) for one in run.invocations if one.get("batch") is not None)
        versions = dict.fromkeys(
            f"{name} {version}" for one in run.invocations for name, version in (one.get("versions") or {}).items()
        )
        rows.append(
            [
                label,
                run.path.name,
                ", ".join(knobs(run.config.policy)) or NONE,
                f"{run.config.mode} mode, question: {run.config.question}",
                ", ".join(f"{name} {value}" for name, value in model.items()),
                ", ".join(f"{name} {value}" for name, value in flat(others).items()) or NONE,
                f"{run.device}, batch {', '.join(batches) or NONE}",
                ", ".join(versions) or NONE,
                "; ".join(f"{one.get('started')} {one.get('command')}" for one in run.invocations) or NONE,
            ]
        )
    columns = ("folder", "policy", "mode", "model", "other settings", "device", "versions", "started, command")
    return Table("Settings", "run", [("", columns)], rows, prose=True)
