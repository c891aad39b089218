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

from pallas_kernels import KVCache, decode_attention, for_decoding, token_scores
from pallas_kernels.mesh import everywhere
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
    observe_rows,
)
from recycled_jax.layers import through, weights_of
from recycled_jax.model import Llama, attention_inputs, attention_output, embed, logits, mlp
from recycled_jax.policies import Policy
from recycled_jax.state import CacheDtype, DecodeState, model_cache

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
    cache_dtype: CacheDtype | None = None,
    implementation: str | None = None,
) -> Prefilled:
    """Runs the prompts through the model and fills the cache.

    `tokens` are padded on the right to a multiple of `chunk`; `lengths` (at least 1) say how many count. The prompt
    goes through in pieces of `chunk` tokens, so no matrix of tokens × tokens exists. `capacity` is the number of
    slots per row of the cache and must hold the padded prompt. `prefill` is how prompts attend (default: to
    everything); `observers` are those of the policies that will go on from here (`Policy.observers`), beside the last
    query, which is always kept. `cache_dtype` is how the cache is stored, if not in the dtype of computation.
    """
    config, batch = model.config, tokens.shape[0]
    if tokens.shape[1] % chunk or tokens.shape[1] > capacity:
        raise ValueError(
            f"tokens has {tokens.shape[1]} columns, expected a multiple of chunk={chunk} within {capacity=}"
        )
    prefill = DensePrefill() if prefill is None else prefill
    prefill.check(config, chunk)
    watching = tuple(dict.fromkeys((LastQueries(1), *observers)))
    sizes = {"batch": batch, "capacity": capacity, "dtype": model.dtype}
    observed = (prefill.start(config, **sizes), *(observer.start(config, **sizes) for observer in watching))
    nothing, no_logits = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, config.vocab), jnp.float32)
    record = PromptRecord(nothing, no_logits, observed, (prefill, *watching), config)
    cache = model_cache(config, **sizes, implementation=implementation, cache_dtype=cache_dtype)
    empty = Prefilled(cache, record)
    return read_on(model, params, empty, tokens, lengths, first=0, chunk=chunk, implementation=implementation)


def read_on(
    model: Llama,
    params: Params,
    prefilled: Prefilled,
    tokens: Int[Array, "batch tokens"],
    counts: Int[Array, " batch"],
    *,
    first: int | Int[Array, ""] | Int[Array, " batch"],
    chunk: int,
    implementation: str | None = None,
) -> Prefilled:
    """What has been read, with `counts` (at least 1) more tokens in every row; those read before are not touched.

    `tokens` are padded on the right to a multiple of `chunk`. `first` is the slot of the first of them: the rows'
    lengths, or one number where these are equal, and then every chunk must end within the capacity; otherwise, of each
    row, those that hold a token. What observers kept must have been told of the new tokens (`Observer.resume`).
    """
    config, weights, record = model.config, params["params"], prefilled.prompts
    batch, padded = tokens.shape
    rows, lengths = jnp.arange(batch), first + counts
    prefill, watching = record.prefill, [way for way in record.observers if isinstance(way, Observer)]
    by_row = jnp.ndim(first) > 0

    def read_chunk(index, carry):
        cache, last, carried, seen = carry
        start = first + index * chunk
        piece = lax.dynamic_slice_in_dim(tokens, index * chunk, chunk, axis=1)
        angles = rope.angles(config, jnp.reshape(start, (-1, 1)) + jnp.arange(chunk, dtype=jnp.int32)[None, :])

        def layer_step(carry, layer):
            x, cache, carried, handed, seen = carry
            w = weights_of(weights["layers"], layer)
            bare_q, k, v = attention_inputs(w, config, x)
            q, k = rope.rotate(bare_q, *angles), rope.rotate(k, *angles)
            cache = write_rows(cache, layer, start, k, v) if by_row else cache.write(layer, start, k, v)
            here = PromptChunk(layer, start, lengths, bare_q, q, k, v, implementation)
            attended, carried, handed = prefill.attend(carried, handed, here, cache)
            seen = tuple(
                observe_rows(o, s, here, cache) if by_row else o.observe(s, here, cache)
                for o, s in zip(watching, seen, strict=True)
            )
            x = x + attention_output(w, attended)
            x = x + mlp(w, config, x)
            return (x, cache, carried, handed, seen), None

        x = embed(weights, piece, model.dtype)
        handed = prefill.before_layers(config, batch=batch, capacity=cache.capacity, chunk=chunk)
        carry = (x, cache, carried, handed, seen)
        (x, cache, carried, _, seen), _ = through(layer_step, carry, range(config.layers), weights["layers"])
        column = lengths - 1 - start
        ends_here = (column >= 0) & (column < chunk)
        last = jnp.where(ends_here[:, None], x[rows, jnp.clip(column, 0, chunk - 1)], last)
        return cache, last, carried, seen

    last = jnp.zeros((batch, config.embed), model.dtype)
    carry = (prefilled.cache, last, record.seen(prefill), tuple(record.seen(observer) for observer in watching))
    with jax.named_scope("prefill"):
        cache, last, carried, seen = lax.fori_loop(0, padded // chunk, read_chunk, carry)
    end = logits(weights, config, last[:, None])[:, 0]
    return Prefilled(cache, PromptRecord(everywhere(lengths), end, (carried, *seen), (prefill, *watching), config))


def write_rows(
    cache: KVCache,
    layer: Int[Array, ""] | int,
    start: Int[Array, " batch"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
) -> KVCache:
    """`KVCache.write` from another slot on in every row; what would stand past the end is not written."""

    def append(column, cache):
        return cache.append(layer, start + column, k[:, :, column], v[:, :, column])

    return lax.fori_loop(0, k.shape[2], append, cache)


def begin(policy: Policy, prefilled: Prefilled, *, implementation: str | None = None) -> DecodeState:
    """The state before the first decode step, with what the policy's method keeps, a first selection for instance."""
    kept = policy.method.begin(prefilled, implementation=implementation)
    cache = for_decoding(prefilled.cache) if policy.method.keeps_cache else None
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
        w = weights_of(weights["layers"], layer)
        bare_q, k, v = attention_inputs(w, config, x)
        q, k = rope.rotate(bare_q, *angles), rope.rotate(k, *angles)
        present = Token(*(heads[:, :, 0] for heads in (bare_q, q, k, v)))
        here = Here(layer, lengths, step, active, kind, implementation)
        if cache is not None:
            # Written outside any conditional: a branch that returned the cache would copy it. Past the end, the row
            # writes nothing.
            slots = jnp.where(active, state.lengths, cache.capacity)
            cache = cache.append(layer, slots, present.k, present.v)
            k, v = cache.as_read(present.k, present.v)  # whoever keeps the token keeps what the cache has
            present = present._replace(k=k, v=v)
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
        carry, trace = through(functools.partial(layer_step, role=role), carry, run, weights["layers"])
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
