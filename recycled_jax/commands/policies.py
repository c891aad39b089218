"""`recycled policies`: what can be decoded with."""

import textwrap
from pathlib import Path

from recycled_jax.policies import POLICIES
from recycled_jax.policies.describe import COLUMNS, cells, describe, markdown, spell_knobs
from recycled_jax.prefill.registry import PREFILLS

WIDTH = 100


def policies(name: str | None = None, *, out: str | None = None) -> None:
    """Lists the policies on their axes, or explains one.

    Args:
        name: A policy to explain; without one, all are listed.
        out: Markdown file to write the whole documentation of the policies to.
    """
    if out is not None:
        path = Path(out)
        if path.suffix != ".md" or not path.parent.is_dir():
            raise ValueError(f"{out=} is not a .md file in a folder that exists")
        path.write_text(markdown(), encoding="utf-8")
        print(f"{len(POLICIES)} policies in {out}")
    elif name is not None:
        _explain(name)
    else:
        for policy in POLICIES:
            line = dict(zip(COLUMNS, cells(describe(policy)), strict=True))
            print(line.pop("policy"))
            for column, cell in line.items():
                print(f"    {column:8} {cell}")
            print()
        print(f"`recycled policies NAME` explains one. Ways to read prompts, --prefill: {', '.join(PREFILLS)}.")


def _explain(name: str) -> None:
    description = describe(name)
    print(name)
    print(textwrap.fill(description.text, WIDTH, initial_indent="  ", subsequent_indent="  "))
    for column, cell in zip(COLUMNS[1:], cells(description)[1:], strict=True):
        print(f"  {column:8} {cell}")
    for knob in spell_knobs(description.knobs):
        print(f"    --policy.{knob}")
