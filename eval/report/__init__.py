"""One HTML page about evaluated runs, which needs no network: what they score and cost, their settings and pictures.
The numbers of the pictures stand beside it as CSV, the tables as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from eval.finished.names import labels
from eval.finished.read import read_runs
from eval.finished.run import Run
from eval.report.bench_tables import bench_tables
from eval.report.content import Content
from eval.report.markdown import markdown
from eval.report.page import html_page
from eval.report.pictures import pictures
from eval.report.score_tables import SCORE_NOTES, score_tables
from eval.report.settings_table import settings_table


def report(runs: list[Path], out: Path) -> Path:
    """Writes `out`, or `out/report.html` if `out` is not named .html; beside it Markdown of the tables and CSV of each
    picture, all with the page's name in front. Returns the page.

    Raises ValueError without runs, and as `read_runs` and `change`.
    """
    if not runs:
        raise ValueError("runs=[] is empty; expected at least one folder")
    page = out if out.suffix == ".html" else out / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    content = _content(read_runs(runs))
    for picture in content.pictures:
        page.with_name(f"{page.stem}_{picture.name}.csv").write_text(picture.csv(), encoding="utf-8")
    page.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
    page.write_text(html_page(content, page.stem), encoding="utf-8")
    return page


def _content(runs: Sequence[Run]) -> Content:
    models, modes, devices = (
        ", ".join(dict.fromkeys(names))
        for names in zip(*((str(r.config.model.get("name")), r.config.mode, r.device) for r in runs), strict=True)
    )
    drawn, missing = pictures(runs)
    return Content(
        title=f"Evaluation of {models}",
        lead=f"{len(runs)} runs; scores in {modes} mode on {devices}.",
        results=[*score_tables(runs), *bench_tables(runs)],
        settings=settings_table(runs),
        notes=SCORE_NOTES,
        pictures=drawn,
        failures=_failures(runs),
        missing=missing,
    )


def _failures(runs: Sequence[Run]) -> list[str]:
    return [
        f"Failed: {task} {length} of {label}: {cell.error}"
        for run, label in zip(runs, labels(runs), strict=True)
        for (task, length), cell in run.cells.items()
        if cell.error is not None
    ]
