"""Prefill and the decode step: tokens in, logits and the next `DecodeState` out.

A token's way through a step: embedding → per layer: q, k, v → k, v appended to the cache → attention, over the
whole cache or over the recycled selection (`recycling`) → MLP → logits.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache, decode_attention, prefill_attention
from recycled_jax import recycling, rope
from recycled_jax.model import Llama, attention_inputs, attention_output, embed, logits, mlp
from recycled_jax.policies import Policy
from recycled_jax.recycling import LayerInput, LayerTrace, StepKind
from recycled_jax.state import DecodeState, model_cache

Params = Mapping


@struct.dataclass
class PromptEnds:
    """What the last token of every prompt leaves behind besides keys and values: all that a first selection needs."""

    lengths: Int[Array, " batch"]
    logits: Float[Array, "batch vocab"]
    bare_q: Float[Array, "layers batch query_heads head_dim"]  # its queries, before rotation
    q: Float[Array, "layers batch query_heads head_dim"]


@struct.dataclass
class Prefilled:
    """Prompts that have been read: any policy can go on from here, several from the same one."""

    cache: KVCache
    ends: PromptEnds


def read_prompts(
    model: Llama,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"],
    *,
    capacity: int,
    chunk: int = 512,
    implementation: str | None = None,
) -> Prefilled:
    """Runs the prompts through the model and fills the cache.

    `tokens` are padded on the right to a multiple of `chunk`; `lengths` (at least 1) say how many count. The prompt
    goes through in pieces of `chunk` tokens, so no matrix of tokens × tokens exists. `capacity` is the number of
    slots per row of the cache and must hold the padded prompt.
    """
    config, weights = model.config, params["params"]
    batch, padded = tokens.shape
    if padded % chunk or padded > capacity:
        raise ValueError(f"tokens has {padded} columns, expected a multiple of chunk={chunk} within {capacity=}")
    rows = jnp.arange(batch)

    def read_chunk(index, carry):
        cache, last, bare_q_end, q_end = carry
        start = index * chunk
        piece = lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        angles = rope.angles(config, (start + jnp.arange(chunk, dtype=jnp.int32))[None, :])
        column = jnp.clip(lengths - 1 - start, 0, chunk - 1)
        ends_here = (lengths - 1) // chunk == index

        def layer_step(carry, inputs):
            x, cache = carry
            w, layer = inputs
            bare_q, k, v = attention_inputs(w, config, x)
            q, k = rope.rotate(bare_q, *angles), rope.rotate(k, *angles)
            cache = cache.write(layer, start, k, v)
            attended = prefill_attention(q, cache, start, layer=layer, implementation=implementation)
            x = x + attention_output(w, attended)
            x = x + mlp(w, config, x)
            return (x, cache), (bare_q[rows, :, column], q[rows, :, column])

        x = embed(weights, piece, model.dtype)
        (x, cache), (bare_q, q) = lax.scan(layer_step, (x, cache), (weights["layers"], jnp.arange(config.layers)))
        last = jnp.where(ends_here[:, None], x[rows, column], last)
        bare_q_end = jnp.where(ends_here[None, :, None, None], bare_q, bare_q_end)
        q_end = jnp.where(ends_here[None, :, None, None], q, q_end)
        return cache, last, bare_q_end, q_end

    cache = model_cache(config, batch=batch, capacity=capacity, dtype=model.dtype, implementation=implementation)
    last = jnp.zeros((batch, config.embed), model.dtype)
    no_query = jnp.zeros((config.layers, batch, config.query_heads, config.head_dim), model.dtype)
    with jax.named_scope("prefill"):
        cache, last, bare_q, q = lax.fori_loop(0, padded // chunk, read_chunk, (cache, last, no_query, no_query))
    return Prefilled(cache, PromptEnds(lengths, logits(weights, config, last[:, None])[:, 0], bare_q, q))


def begin(policy: Policy, prefilled: Prefilled, *, implementation: str | None = None) -> DecodeState:
    """The state before the first decode step, with the policy's first selection made by each prompt's last token."""
    cache, ends = prefilled.cache, prefilled.ends
    selection = memory = None
    if policy.recycling is not None:
        selection, memory = recycling.first_selection(
            policy.recycling, cache, ends.lengths, ends.bare_q, ends.q, implementation=implementation
        )
    return DecodeState(cache, ends.lengths, jnp.zeros((), jnp.int32), selection, memory)


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
        model, params, tokens, lengths, capacity=capacity, chunk=chunk, implementation=implementation
    )
    return prefilled.ends.logits, begin(policy, prefilled, implementation=implementation)


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
    config, weights = model.config, params["params"]
    active = jnp.ones(token.shape, bool) if active is None else active
    lengths = state.lengths + active
    step = state.step + jnp.any(active)
    # past the end: the row writes nothing
    slots = jnp.where(active, state.lengths, state.cache.capacity)
    angles = rope.angles(config, state.lengths[:, None])

    def layer_step(carry, inputs):
        x, cache, selection, memory = carry
        w, layer = inputs
        bare_q, k, v = attention_inputs(w, config, x)
        q, k = rope.rotate(bare_q, *angles), rope.rotate(k, *angles)
        here = LayerInput(*(heads[:, :, 0] for heads in (bare_q, q, k, v)))
        # Written outside any conditional: a branch that returned the cache would copy it.
        cache = cache.append(layer, slots, here.k, here.v)
        if policy.recycling is None:
            with jax.named_scope("attention/full"):
                attended = decode_attention(here.q, cache, lengths, layer=layer, implementation=implementation)
            trace = None
        else:
            attended, selection, memory, trace = recycling.attend(
                policy.recycling,
                layer,
                here,
                cache,
                selection,
                memory,
                lengths=lengths,
                step=step,
                active=active,
                kind=kind,
                coverage=coverage,
                implementation=implementation,
            )
        x = x + attention_output(w, attended[:, :, None])
        x = x + mlp(w, config, x)
        return (x, cache, selection, memory), trace

    x = embed(weights, token[:, None], model.dtype)
    carry = (x, state.cache, state.selection, state.memory)
    (x, cache, selection, memory), trace = lax.scan(layer_step, carry, (weights["layers"], jnp.arange(config.layers)))
    if trace is None:
        trace = _dense_trace(config.layers, active)
    return (
        logits(weights, config, x)[:, 0],
        DecodeState(cache, lengths, step, selection, memory),
        trace,
    )


def _dense_trace(layers: int, active: Bool[Array, " batch"]) -> LayerTrace:
    """Every active row reads everything in every layer."""
    always = jnp.broadcast_to(active[None], (layers, *active.shape))
    nothing = jnp.full(always.shape, jnp.nan)
    return LayerTrace(always, always, nothing, nothing, nothing)
