"""Pictures of what a policy saves: time per decode step against length, and scores against bytes read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from recycled_jax.plots.style import draw_line, finish, looks, marks, new_panels, powers_of_two, set_title

Styles = Mapping[str, dict[str, Any]]


def decode_times(
    figure: FigureBase,
    seconds: Mapping[str, Mapping[int, float]],
    *,
    dense: str | None = None,
    styles: Styles | None = None,
    origin: str | None = None,
) -> list[Axes]:
    """Milliseconds of a decode step against length: `seconds` by label, then by the number of tokens in context.

    Beside the points of others stands how many times as fast as the `dense` label they are at that length. `styles`
    are those of `looks` (default: in the order of the labels); `origin` says where it was measured.
    """
    styles = styles or looks(list(seconds), dense)
    [axes] = new_panels(figure, 1)
    longest = max((one for by_length in seconds.values() for one in by_length.values()), default=0.0)
    of_dense = seconds.get(dense, {}) if dense is not None else {}
    for label, by_length in seconds.items():
        lengths = sorted(by_length)
        draw_line(axes, lengths, [1e3 * by_length[length] for length in lengths], styles[label])
        for length in sorted(of_dense.keys() & by_length.keys()) if label != dense else ():
            look = {"fontsize": 7.5, "color": styles[label]["color"], "textcoords": "offset points", "va": "center"}
            beside = (5, 7 if by_length[length] < 0.1 * longest else -7)  # clear of the x axis
            ratio, at = f"{of_dense[length] / by_length[length]:.1f}×", (length, 1e3 * by_length[length])
            axes.annotate(ratio, at, beside, **look)
    powers_of_two(axes, sorted({length for by_length in seconds.values() for length in by_length}), thousands=True)
    axes.margins(x=0.12)
    axes.set(xlabel="context (tokens)", ylabel="ms per decode step", ylim=(0, None))
    set_title(axes, "decode time against length" + (f"; ×: times as fast as {dense}" if dense else ""), size=9)
    finish(figure, [axes], marks({label: styles[label] for label in seconds}), origin)
    return [axes]


def scores_against_bytes(
    figure: FigureBase,
    scores: Mapping[str, Mapping[str, float]],
    kv_bytes: Mapping[str, float],
    *,
    dense: str | None = None,
    styles: Styles | None = None,
    origin: str | None = None,
) -> list[Axes]:
    """Scores (0 to 1, shown in percent) by label and task, against the label's `kv_bytes`, read per token and row.

    The colour is the label's, the marker the task's. Other arguments as those of `decode_times`.
    """
    styles = styles or looks(list(scores), dense)
    tasks = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    sizes = np.linspace(11, 6, len(tasks))  # falling: all are seen where they coincide
    shapes = {task: {"marker": "os^D"[place % 4], "ms": sizes[place]} for place, task in enumerate(tasks)}
    [axes] = new_panels(figure, 1)
    for label, by_task in scores.items():
        for task, value in by_task.items():
            look = {"ls": "", "color": styles[label]["color"], "mec": "white", **shapes[task]}
            axes.plot([kv_bytes[label] / 1e6], [100 * value], **look)
    axes.set(xlabel="KV bytes read per token (MB)", ylabel="score (%)", xlim=(0, None), ylim=(-5, 105))
    axes.margins(x=0.1)
    set_title(axes, "score against bytes read", size=9)
    colours: list[Artist] = [Line2D([], [], lw=4, color=styles[label]["color"], label=label) for label in scores]
    kinds = [Line2D([], [], ls="", color="grey", mfc="none", label=task, **shapes[task]) for task in tasks]
    finish(figure, [axes], [*colours, *kinds], origin)
    return [axes]
