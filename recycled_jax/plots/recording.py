"""A recording: given text decoded once more, step by step, with the positions of every layer's selection kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from recycled_jax.decode import Params, begin, decode_step
from recycled_jax.frame import LayerTrace, Prefilled
from recycled_jax.frame.method import Method
from recycled_jax.model import Llama
from recycled_jax.policies import Policy
from recycled_jax.sharding import on_its_mesh
from recycled_jax.telemetry import Telemetry


@dataclass(frozen=True)
class Recording:
    """What the layers did in every decode step, and which slots their selections held.

    `held[s, l, b, i]` is the share (0 to 1) of the heads of layer l whose selection, for row b, had slot i in decode
    step s; 0 throughout in layers that attend everything or that select no single slots, and after a row's last step.
    """

    telemetry: Telemetry
    held: Float[np.ndarray, "steps layers batch slots"]


@on_its_mesh
def record(
    model: Llama,
    params: Params,
    prefilled: Prefilled,
    tokens: Sequence[Sequence[int]],
    *,
    policy: Policy,
    coverage: bool = True,
    implementation: str | None = None,
) -> Recording:
    """Reads `tokens` (such as `Generation.tokens`) after their prompts under `policy`, and keeps what it selected.

    A row's last token is not read: nothing follows it. Several policies can be recorded on the same text, from one
    prefill, which stays the caller's. The host looks on after every step, and keeps steps × layers × batch × slots
    numbers of four bytes: for looking, not for timing. `coverage` is that of `generate`.

    Raises ValueError when there is no step to record or no room in the cache, when `tokens` has not one row for each
    prompt, for a policy that corrects the cache (corrections are the generation loop's), and for `coverage` with a
    policy that has dropped the cache.
    """
    lengths = np.asarray(prefilled.prompts.lengths)
    counts = np.array([max(len(row) - 1, 0) for row in tokens])
    if len(tokens) != len(lengths):
        raise ValueError(f"tokens has {len(tokens)} rows, expected {len(lengths)}, one for each prompt")
    if counts.max(initial=0) < 1:
        raise ValueError("tokens has no row of 2 tokens or more; there is no decode step to record")
    if policy.correct_every is not None:
        every = policy.correct_every
        raise ValueError(f"policy {policy.name!r} corrects the cache every {every} steps; a recording does not")
    slots = int((lengths + counts).max())
    if slots > prefilled.cache.capacity:
        raise ValueError(
            f"tokens needs {slots} slots, the prompts were read with {prefilled.cache.capacity}; raise max_new_tokens"
        )
    watched = replace(policy, method=_Recorded(policy.method))
    state = _begin(watched, prefilled, implementation=implementation)
    traces, held = [], []
    for step in range(counts.max()):
        token = np.array([row[min(step, len(row) - 1)] for row in tokens], np.int32)
        active = step < counts
        static = {"policy": watched, "coverage": coverage, "implementation": implementation}
        _, state, done = _step(model, params, state, token, active=active, **static)
        traces.append(jax.device_get(done))
        held.append(np.where(active[:, None], jax.device_get(state.kept.held)[..., :slots], 0))
    trace = dict(zip(LayerTrace._fields, map(np.stack, zip(*traces, strict=True)), strict=True))
    bytes_per_element = jnp.dtype(model.dtype).itemsize
    telemetry = Telemetry(model.config, policy, bytes_per_element, lengths, counts, **trace)
    return Recording(telemetry, np.stack(held))


_begin = jax.jit(begin, static_argnames=("policy", "implementation"))
_step = jax.jit(
    decode_step, static_argnames=("model", "policy", "coverage", "implementation"), donate_argnames=("state",)
)


@struct.dataclass
class _Kept:
    """A method's own state, and the share of the heads that hold each slot; its arrays begin with layers, too."""

    own: Any
    held: Float[Array, "layers batch slots"]


@dataclass(frozen=True)
class _Recorded(Method):
    """`method`, whose layers also write down what they hold."""

    method: Method

    @property
    def axes(self):
        return self.method.axes

    @property
    def observers(self):
        return self.method.observers

    @property
    def keeps_cache(self):
        return self.method.keeps_cache

    @property
    def plan(self):
        return self.method.plan

    def runs(self, layers):
        return self.method.runs(layers)

    def begin(self, prefilled, *, implementation):
        cache = prefilled.cache
        held = jnp.zeros((cache.layers, cache.batch, cache.capacity))
        return _Kept(self.method.begin(prefilled, implementation=implementation), held)

    def before_layers(self, state, cache):
        return self.method.before_layers(state.own, cache)

    def attend(self, role, token, cache, state, handed, here):
        done = self.method.attend(role, token, cache, state.own, handed, here)
        held = state.held
        if done.positions is not None:
            batch, heads, _ = done.positions.shape
            rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
            slots = jnp.where(done.positions >= 0, done.positions, held.shape[-1])  # past the end: not written
            by_head = jnp.zeros((batch, heads, held.shape[-1])).at[rows, columns, slots].set(1.0, mode="drop")
            held = held.at[here.layer].set(by_head.mean(axis=1))
        return done._replace(state=_Kept(done.state, held))
