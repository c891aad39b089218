"""The least that a round of lossless decoding must move: the floors of its drafts and of its verifying pass.

A round of S drafted tokens is S recycled steps and one pass that reads what a full step reads, for S + 1 tokens at
once. Where a layer selects by the scores of the pass, these are written for all S + 1 tokens, of which nobody knows yet
which will be the last that stands, and read for that one; the new selection is read and written once, as in a refresh.
"""

import math
from dataclasses import dataclass, replace

from recycled_jax.frame.verifying import wanted_scores
from recycled_jax.planning.floors import floors, recycling
from recycled_jax.planning.setting import Setting

_SCORE = 4  # bytes; float32


@dataclass(frozen=True)
class RoundFloor:
    """Bytes per device; `full`: of a full step, which gives one token."""

    full: float
    drafts: float
    verification: float

    def speedup(self, accepted: int | float) -> float:
        """How many times faster than full decoding, if bytes are all that counts and so many drafted tokens stand in a
        round, on average; one token more comes from the verifying pass."""
        return (accepted + 1) * self.full / (self.drafts + self.verification)

    @property
    def break_even(self) -> float:
        """Drafted tokens that must stand in a round, on average, for it to be no slower than full decoding; more than
        the draft has where that cannot be."""
        return (self.drafts + self.verification) / self.full - 1


def round_floor(setting: Setting, draft: int) -> RoundFloor:
    """With `context` slots in use in every row and drafts of `draft` tokens, whatever the policy's own stride.

    Raises ValueError for a policy that does not recycle.
    """
    if draft < 1:
        raise ValueError(f"{draft=} must be at least 1 token")
    method = recycling(setting)
    steps = floors(setting)
    # Attention to everything reads the keys for the scores as well, whatever the policy's own refresh attends.
    whole = floors(replace(setting, knobs={**setting.knobs, "refresh": "full"})) if method.refresh != "full" else steps
    _, scored = wanted_scores(method, setting.config.layers)
    heads = math.ceil(setting.config.kv_heads / setting.mesh.tensor)
    scores = len(scored) * setting.rows * heads * setting.context * _SCORE / setting.mesh.sequence
    return RoundFloor(steps.full, draft * steps.recycled, whole.refresh + (draft + 2) * scores)
