"""Prefill and the decode step: tokens in, logits and the next `DecodeState` out.

A token's way through a step: embedding → per layer: q, k, v → k, v appended to the cache → attention, over the
whole cache or over the recycled selection (`frame`) → MLP → logits.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import decode_attention, token_scores
from recycled_jax import rope
from recycled_jax.frame.layer_plan import Role
from recycled_jax.frame.method import Here, LayerTrace, StepKind, Token, dense_trace
from recycled_jax.frame.prompt import (
    DensePrefill,
    LastQueries,
    Observer,
    PrefillAttention,
    Prefilled,
    PromptChunk,
    PromptRecord,
)
from recycled_jax.model import Llama, attention_inputs, attention_output, embed, logits, mlp
from recycled_jax.policies import Policy
from recycled_jax.state import DecodeState, model_cache

Params = Mapping


def read_prompts(
    model: Llama,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"],
    *,
    capacity: int,
    chunk: int = 512,
    prefill: PrefillAttention | None = None,
    observers: Sequence[Observer] = (),
    implementation: str | None = None,
) -> Prefilled:
    """Runs the prompts through the model and fills the cache.

    `tokens` are padded on the right to a multiple of `chunk`; `lengths` (at least 1) say how many count. The prompt
    goes through in pieces of `chunk` tokens, so no matrix of tokens × tokens exists. `capacity` is the number of
    slots per row of the cache and must hold the padded prompt. `prefill` is how prompts attend (default: to
    everything); `observers` are those of the policies that will go on from here (`Policy.observers`), beside the last
    query, which is always kept.
    """
    config, weights = model.config, params["params"]
    batch, padded = tokens.shape
    if padded % chunk or padded > capacity:
        raise ValueError(f"tokens has {padded} columns, expected a multiple of chunk={chunk} within {capacity=}")
    prefill = DensePrefill() if prefill is None else prefill
    prefill.check(config, chunk)
    watching = tuple(dict.fromkeys((LastQueries(1), *observers)))
    rows = jnp.arange(batch)

    def read_chunk(index, carry):
        cache, last, carried, seen = carry
        start = index * chunk
        piece = lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        angles = rope.angles(config, (start + jnp.arange(chunk, dtype=jnp.int32))[None, :])

        def layer_step(carry, inputs):
            x, cache, carried, handed, seen = carry
            w, layer = inputs
            bare_q, k, v = attention_inputs(w, config, x)
            q, k = rope.rotate(bare_q, *angles), rope.rotate(k, *angles)
            cache = cache.write(layer, start, k, v)
            here = PromptChunk(layer, start, lengths, bare_q, q, k, v, implementation)
            attended, carried, handed = prefill.attend(carried, handed, here, cache)
            seen = tuple(o.observe(s, here, cache) for o, s in zip(watching, seen, strict=True))
            x = x + attention_output(w, attended)
            x = x + mlp(w, config, x)
            return (x, cache, carried, handed, seen), None

        x = embed(weights, piece, model.dtype)
        handed = prefill.before_layers(config, batch=batch, capacity=capacity, chunk=chunk)
        carry = (x, cache, carried, handed, seen)
        (x, cache, carried, _, seen), _ = lax.scan(layer_step, carry, (weights["layers"], jnp.arange(config.layers)))
        column = jnp.clip(lengths - 1 - start, 0, chunk - 1)
        ends_here = (lengths - 1) // chunk == index
        last = jnp.where(ends_here[:, None], x[rows, column], last)
        return cache, last, carried, seen

    sizes = {"batch": batch, "capacity": capacity, "dtype": model.dtype}
    cache = model_cache(config, **sizes, implementation=implementation)
    last = jnp.zeros((batch, config.embed), model.dtype)
    carry = (cache, last, prefill.start(config, **sizes), tuple(o.start(config, **sizes) for o in watching))
    with jax.named_scope("prefill"):
        cache, last, carried, seen = lax.fori_loop(0, padded // chunk, read_chunk, carry)
    end = logits(weights, config, last[:, None])[:, 0]
    return Prefilled(cache, PromptRecord(lengths, end, (carried, *seen), (prefill, *watching), config))


def begin(policy: Policy, prefilled: Prefilled, *, implementation: str | None = None) -> DecodeState:
    """The state before the first decode step, with what the policy's method keeps, a first selection for instance."""
    kept = policy.method.begin(prefilled, implementation=implementation)
    cache = prefilled.cache if policy.method.keeps_cache else None
    return DecodeState(cache, prefilled.prompts.lengths, jnp.zeros((), jnp.int32), kept)


def prefill(
    model: Llama,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"],
    *,
    policy: Policy,
    capacity: int,
    chunk: int = 512,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """`read_prompts`, then `begin`: the logits of each row's last token, and the state to decode from."""
    prefilled = read_prompts(
        model,
        params,
        tokens,
        lengths,
        capacity=capacity,
        chunk=chunk,
        prefill=policy.prefill,
        observers=policy.observers,
        implementation=implementation,
    )
    return prefilled.prompts.logits, begin(policy, prefilled, implementation=implementation)


def decode_step(
    model: Llama,
    params: Params,
    state: DecodeState,
    token: Int[Array, " batch"],
    *,
    policy: Policy,
    active: Bool[Array, " batch"] | None = None,
    kind: StepKind = "scheduled",
    coverage: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch vocab"], DecodeState, LayerTrace]:
    """One new token for every row: the logits after it, the next state, and what the layers did (`[layers, batch]`).

    Rows that are not `active` (default: all are) leave their state as it is, and their logits mean nothing. Each
    active row needs a free slot. `kind` other than `scheduled` overrides the schedule. `coverage` also measures the
    attention mass on the selection, at the price of reading all keys.
    """
    config, weights, method = model.config, params["params"], policy.method
    if coverage and state.cache is None:
        raise ValueError(f"coverage=True needs the full cache, which policy {policy.name!r} has dropped")
    active = jnp.ones(token.shape, bool) if active is None else active
    lengths = state.lengths + active
    step = state.step + jnp.any(active)
    angles = rope.angles(config, state.lengths[:, None])

    def layer_step(carry, layer, role: Role):
        x, cache, kept, handed = carry
        w = jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, layer, keepdims=False), weights["layers"])
        bare_q, k, v = attention_inputs(w, config, x)
        q, k = rope.rotate(bare_q, *angles), rope.rotate(k, *angles)
        present = Token(*(heads[:, :, 0] for heads in (bare_q, q, k, v)))
        here = Here(layer, lengths, step, active, kind, implementation)
        if cache is not None:
            # Written outside any conditional: a branch that returned the cache would copy it. Past the end, the row
            # writes nothing.
            slots = jnp.where(active, state.lengths, cache.capacity)
            cache = cache.append(layer, slots, present.k, present.v)
        if role == "dense":
            with jax.named_scope("attention/full"):
                assert cache is not None  # a method with dense layers keeps it
                output = decode_attention(present.q, cache, lengths, **here.to_op)
            trace = dense_trace(lengths, active)
        else:
            output, kept, handed, trace, positions = method.attend(role, present, cache, kept, handed, here)
            if coverage and positions is not None:
                trace = trace._replace(coverage=_coverage(present.q, cache, positions, here))
        x = x + attention_output(w, output[:, :, None])
        x = x + mlp(w, config, x)
        return (x, cache, kept, handed), trace

    x = embed(weights, token[:, None], model.dtype)
    carry = (x, state.cache, state.kept, method.before_layers(state.kept, state.cache))
    traces = []
    for role, run in method.runs(config.layers):
        # over numbers, not over slices of the weights: a slice of the stack would be copied
        carry, trace = lax.scan(functools.partial(layer_step, role=role), carry, jnp.arange(run.start, run.stop))
        traces.append(trace)
    x, cache, kept, _ = carry
    trace = jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces)
    return logits(weights, config, x)[:, 0], DecodeState(cache, lengths, step, kept), trace


def _coverage(
    q: Float[Array, "batch query_heads head_dim"], cache, positions: Int[Array, "batch heads entries"], here: Here
) -> Float[Array, " batch"]:
    mass = token_scores(q, cache, here.lengths, group_reduction="mean", **here.to_op)
    positions = jnp.broadcast_to(positions, (*mass.shape[:2], positions.shape[2]))  # where the heads share one
    held = jnp.take_along_axis(mass, jnp.maximum(positions, 0), axis=-1)
    return jnp.mean(jnp.sum(jnp.where(positions >= 0, held, 0.0), axis=-1), axis=-1)
