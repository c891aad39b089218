"""What every method is: how one layer attends in one decode step, and what it keeps from step to step."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache
from recycled_jax.frame.layer_plan import EVERY_LAYER, LayerPlan, Role
from recycled_jax.frame.prompt import Observer, Prefilled

# `scheduled`: the policy's schedule decides, by `lax.cond`. The other two leave no conditional in the program: for
# loops that know the phase of a fixed stride themselves.
StepKind = Literal["scheduled", "refresh", "recycled"]


class Token(NamedTuple):
    """The present token, as one layer sees it; `bare_q` is `q` before rotation."""

    bare_q: Float[Array, "batch query_heads head_dim"]
    q: Float[Array, "batch query_heads head_dim"]
    k: Float[Array, "batch kv_heads head_dim"]
    v: Float[Array, "batch kv_heads head_dim"]


@dataclass(frozen=True)
class Here:
    """Where and when a layer attends. Not a pytree: branches of a conditional close over it.

    `lengths` count the present token, which stands in slot `lengths - 1`; `step` is 1 for the first decode step after
    prefill. Rows that are not `active` change nothing, and their output means nothing.
    """

    layer: Int[Array, ""] | int
    lengths: Int[Array, " batch"]
    step: Int[Array, ""]
    active: Bool[Array, " batch"]
    kind: StepKind = "scheduled"
    implementation: str | None = None

    @property
    def to_op(self) -> dict[str, Any]:
        """The arguments that every operation on a layer of the cache takes."""
        return {"layer": self.layer, "implementation": self.implementation}


class LayerTrace(NamedTuple):
    """What happened in one layer at one step, for telemetry; NaN where it does not apply."""

    requested: Bool[Array, " batch"]  # the row's own wish for a new selection
    refreshed: Bool[Array, " batch"]  # whether it got one
    similarity: Float[Array, " batch"]  # cosine with the query of the last refresh
    overlap: Float[Array, " batch"]  # at a refresh: Jaccard overlap of the old and the new selection, mean over heads
    attended: Float[Array, " batch"]  # slots attended, mean over kv heads
    scored: Float[Array, " batch"]  # what else was read, per kv head, in slots of keys (a key and its value are two)
    coverage: Float[Array, " batch"]  # attention mass on the selection, mean over query heads; when asked for


class Attended(NamedTuple):
    """What a layer gives: its attention, its method's state, what it hands to the layer above, and what happened.

    `positions` is the selection that the layer holds or has taken over, -1 for empty entries; None where there is none.
    """

    output: Float[Array, "batch query_heads head_dim"]
    state: Any
    handed: Any
    trace: LayerTrace
    positions: Int[Array, "batch heads entries"] | None


class Axes(NamedTuple):
    """A method on the three axes, in words."""

    scorer: str
    selector: str
    schedule: str


class Method(ABC):
    """How a layer attends in a decode step. Implementations are frozen dataclasses of the method's parts.

    Its state is a pytree whose arrays begin with the axis of layers; a layer changes its own part of it only.
    """

    @property
    @abstractmethod
    def axes(self) -> Axes:
        """What it is, for those who read about it."""

    @property
    def observers(self) -> tuple[Observer, ...]:
        """What has to be seen of the prompt, for `begin`."""
        return ()

    @property
    def keeps_cache(self) -> bool:
        """Whether decode steps may read the full cache. If not, it is dropped after prefill, and `attend` gets none."""
        return True

    @property
    def plan(self) -> LayerPlan:
        """The layers' roles. `attend` is called for those that select or follow."""
        return EVERY_LAYER

    def runs(self, layers: int) -> Iterator[tuple[Role, range]]:
        """Neighbouring layers of one role, bottom up."""
        return self.plan.runs(layers)

    @abstractmethod
    def begin(self, prefilled: Prefilled, *, implementation: str | None) -> Any:
        """The state before the first decode step."""

    def corrected(self, state: Any, cache: KVCache, *, implementation: str | None) -> Any:
        """The state after keys and values of the cache were corrected (`correction`): copies of them are made anew."""
        del cache, implementation
        return state

    def before_layers(self, state: Any, cache: KVCache | None) -> Any:
        """What the lowest layer is handed, step by step: shapes and types of what layers hand up."""
        del state, cache
        return ()

    @abstractmethod
    def attend(self, role: Role, token: Token, cache: KVCache | None, state: Any, handed: Any, here: Here) -> Attended:
        """Attention of the present token, whose key and value stand in the cache already."""


@dataclass(frozen=True)
class Dense(Method):
    """Every layer reads the whole cache at every step."""

    @property
    def axes(self):
        return Axes("none", "everything", "every step")

    def runs(self, layers):
        yield "dense", range(layers)

    def begin(self, prefilled, *, implementation):
        return ()

    def attend(self, role, token, cache, state, handed, here):
        raise NotImplementedError("dense layers are the decode step's own")


def in_words(part: Any) -> str:
    """A part by its name and the fields that are not at their defaults: `top-k(k=1024, pool=7)`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(part).__name__.removesuffix("Scorer")).lower()
    told = []
    for field in fields(part):
        value = getattr(part, field.name)
        if value != field.default:
            told.append(in_words(value) if is_dataclass(value) else f"{field.name}={value}")
    return f"{name}({', '.join(told)})" if told else name


def layers_in_words(plan: LayerPlan) -> str:
    """What a layer plan adds to a schedule: nothing, or which layers do what."""
    dense = f"; layers {', '.join(map(str, plan.dense))} dense" if plan.dense else ""
    select = f"; layers {', '.join(map(str, plan.select))} select, the others follow" if plan.select else ""
    return dense + select


def dense_trace(lengths: Int[Array, " batch"], active: Bool[Array, " batch"]) -> LayerTrace:
    """Of a layer that reads everything."""
    nothing = jnp.full(active.shape, jnp.nan)
    return LayerTrace(active, active, nothing, nothing, lengths.astype(jnp.float32), jnp.zeros(active.shape), nothing)


def selecting_trace(
    positions: Int[Array, "batch heads entries"], scored: Float[Array, " batch"], here: Here
) -> LayerTrace:
    """Of a layer that has selected anew and attended its selection."""
    nothing = jnp.full(here.lengths.shape, jnp.nan)
    return LayerTrace(here.active, here.active, nothing, nothing, slots_held(positions), scored, nothing)


def slots_held(positions: Int[Array, "batch heads entries"]) -> Float[Array, " batch"]:
    """Entries in use, mean over the heads."""
    return jnp.mean(jnp.sum(positions >= 0, axis=-1), axis=-1)
