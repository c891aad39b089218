"""The table of docs/plan.md is that of the plans beside it."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def row(plan: Path) -> str:
    told = json.loads(plan.read_text())
    setting, chip = told["setting"], told["chip"]
    model = plan.stem.removesuffix(f"_{setting['topology']}")
    held = max(program["total"] for program in told["programs"])
    return (
        f"| {model} | {setting['topology']} | {setting['batch']} | {held / 1e9:.2f} of {chip['hbm'] / 1e9:.1f} | "
        f"{told['ideal_speedup']:.2f} | {told['ideal_speedup_limit']:.2f} |"
    )


def test_the_table_is_that_of_the_plans():
    plans = sorted((DOCS / "plans").glob("*.json"))
    lines = (DOCS / "plan.md").read_text().splitlines()
    assert len(plans) == 4
    assert sorted(map(row, plans)) == sorted(line for line in lines if line.startswith("| llama-3"))
