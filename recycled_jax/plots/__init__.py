"""Pictures: a figure in, its axes out.

What happened in a generation (`Telemetry`): `selection_lifetimes`, `recovered_attention`. Where selections were
(`record` makes a `Recording`): `selected_positions`. What it saves: `decode_times`, `scores_against_bytes`.
`new_figure` makes a figure without pyplot; those of pyplot, and subfigures, serve as well. `style` is how all look.
"""

from recycled_jax.plots.recording import Recording, record
from recycled_jax.plots.schedule import recovered_attention, selection_lifetimes
from recycled_jax.plots.selections import selected_positions
from recycled_jax.plots.speed import decode_times, scores_against_bytes
from recycled_jax.plots.style import looks, new_figure

__all__ = [
    "Recording",
    "decode_times",
    "looks",
    "new_figure",
    "record",
    "recovered_attention",
    "scores_against_bytes",
    "selected_positions",
    "selection_lifetimes",
]
