"""The frame that holds every policy: scorer × selector × schedule, over steps and over layers.

`Method` is how a layer attends in a decode step: `Dense`; `Recycling`, a selection kept over steps; `Selecting`, a
selection made anew at every step, perhaps shared by the layers above; `Evicting`, a buffer that is all that is left of
the past. `Scorer`, `Selector`, `Schedule` and `LayerPlan` are what they are put together from. `Observer` sees the
prompt go by, `PrefillAttention` reads it.
"""

from recycled_jax.frame.evicting import Evicting, EvictingState, Eviction
from recycled_jax.frame.layer_plan import LayerPlan, Role
from recycled_jax.frame.method import Attended, Axes, Dense, Here, LayerTrace, Method, StepKind, Token
from recycled_jax.frame.prompt import (
    DensePrefill,
    LastQueries,
    Observer,
    PrefillAttention,
    Prefilled,
    PromptChunk,
    PromptRecord,
)
from recycled_jax.frame.recycling import Recycling, RecyclingState, RefreshAttention, RefreshMemory, RowRule, Selection
from recycled_jax.frame.schedules import FixedStride, Never, QueryCheck, QueryPoint, Schedule
from recycled_jax.frame.scorers import AttentionScorer, FirstHeadScorer, GroupReduction, RecencyScorer, Scorer
from recycled_jax.frame.selecting import Selecting
from recycled_jax.frame.selectors import Selector, TopK, TopPages

__all__ = [
    "Attended",
    "AttentionScorer",
    "Axes",
    "Dense",
    "DensePrefill",
    "Evicting",
    "EvictingState",
    "Eviction",
    "FirstHeadScorer",
    "FixedStride",
    "GroupReduction",
    "Here",
    "LastQueries",
    "LayerPlan",
    "LayerTrace",
    "Method",
    "Never",
    "Observer",
    "PrefillAttention",
    "Prefilled",
    "PromptChunk",
    "PromptRecord",
    "QueryCheck",
    "QueryPoint",
    "RecencyScorer",
    "Recycling",
    "RecyclingState",
    "RefreshAttention",
    "RefreshMemory",
    "Role",
    "RowRule",
    "Schedule",
    "Scorer",
    "Selecting",
    "Selection",
    "Selector",
    "StepKind",
    "Token",
    "TopK",
    "TopPages",
]
