"""Generation: many decode steps inside one compiled program, for ragged batches of prompts."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, layers_are_copied
from pallas_kernels.mesh import everywhere, parts
from recycled_jax.blocks import Block, LoopState, empty_block, is_eos
from recycled_jax.correction import Uncorrected, correct
from recycled_jax.decode import Params, begin, decode_step, read_prompts
from recycled_jax.drafting import DraftLength, check_draft_length, check_drafter
from recycled_jax.feeding import feed
from recycled_jax.frame import FixedStride, LayerTrace, PrefillAttention, Prefilled, PromptRecord, Recycling
from recycled_jax.layers import for_decoding
from recycled_jax.lossless import LosslessState, Round, begin_rounds, joined, run_rounds
from recycled_jax.mesh import check_decoding
from recycled_jax.model import Llama
from recycled_jax.policies import Policy
from recycled_jax.sampling import Sampling, sample
from recycled_jax.sharding import on_its_mesh
from recycled_jax.state import CacheDtype, DecodeState
from recycled_jax.telemetry import Rounds, Telemetry

# `cond`: every step asks the schedule. `nested`: for a fixed stride, S - 1 recycled steps and a refresh as loops, with
# no conditional in the program. Both give the same tokens and the same state.
Loop = Literal["cond", "nested"]
_ALIGNMENT = 128  # slots; capacities are multiples of it, as TPU tiles want


@dataclass(frozen=True)
class Generation:
    """`tokens` are the generated ids of each row, the end-of-sequence id included where it stopped the row (`stop`:
    `eos` or `limit`); `log_probs` are theirs under the model. Seconds are wall clock; the first call with new shapes
    compiles within them."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    stop: list[str]
    telemetry: Telemetry
    prefill_seconds: float
    decode_seconds: float
    rounds: Rounds | None = None  # of `lossless`


@on_its_mesh
def generate(
    model: Llama,
    params: Params,
    prompts: Sequence[Sequence[int]] | Prefilled,
    *,
    policy: Policy,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    capacity: int | None = None,
    chunk: int | None = None,
    loop: Loop = "cond",
    seed: int = 0,
    fed: Sequence[Sequence[int]] | None = None,
    coverage: bool = False,
    lossless: bool = False,
    draft: DraftLength = 8,
    block: int = 64,
    cache_dtype: CacheDtype | None = None,
    implementation: str | None = None,
    on_block: Callable[[list[list[int]]], bool | None] | None = None,
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens, until one of the model's end-of-sequence ids.

    `prompts` are token ids, special tokens included, or what `read` made of them: then several policies can go on
    from one prefill. (Its cache is copied, so there are two; `prefill_seconds` covers the first selection only.)
    `fed` are tokens that follow each prompt before anything is generated: a question that is read with what the policy
    has kept of the prompt (`feeding`). Their steps are not traced, their seconds count as prefill's.
    `capacity`, `chunk` (default 512) and `cache_dtype` are those of `read`; bytes are counted in the dtype of
    computation, whatever the cache is stored in. `block` decode steps run on the device between two looks
    of the host; after each, `on_block` gets the tokens every row has gained, and may end the generation by answering
    True. `coverage` records the attention mass on the selections, which reads all keys: not for timing. Greedy unless
    `sampling` says otherwise; a sampled row draws by its place in the batch.
    `lossless`: the policy only drafts, up to `draft` tokens at a time (`auto`: twice as many after a draft that stood
    as a whole, up to 16, fewer after others), and a full-attention pass verifies them (`lossless.py`): the text is that
    of full decoding, greedy or sampled; `Generation.rounds` has what drafts came to.

    Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt that does not fit, `nested` with a
    schedule other than a fixed stride, and `lossless` with `nested`, with fed tokens, or with a policy that drops the
    cache, corrects it, or reads prompts other than densely.
    """
    sampling = Sampling() if sampling is None else sampling
    for name, value in (("max_new_tokens", max_new_tokens), ("block", block)):
        _at_least_one(name, value)
    if loop not in get_args(Loop):
        raise ValueError(f"loop={loop!r} must be one of {', '.join(get_args(Loop))}")
    longest = check_draft_length(draft)
    if lossless:
        check_drafter(policy, prompts.prompts.prefill if isinstance(prompts, Prefilled) else policy.prefill)
        if loop == "nested" or fed is not None:
            raise ValueError(
                f"lossless=True needs loop='cond' and no fed tokens, got {loop=} and fed tokens for "
                f"{len(fed or ())} rows"
            )
    stride = _nested_stride(policy) if loop == "nested" else None
    if stride is not None:
        block = -(-block // stride) * stride  # a block starts at phase 0
        if policy.correct_every is not None and policy.correct_every % stride:
            raise ValueError(
                f"correct_every={policy.correct_every} is not a multiple of {stride=}, as loop='nested' needs"
            )
    if fed is not None and stride is not None:
        raise ValueError("fed tokens need loop='cond': nested loops begin at the phase of the first step")
    if fed is not None and len(fed) != _rows(prompts):
        raise ValueError(f"fed has {len(fed)} rows, expected {_rows(prompts)}, one for each prompt")
    room = max_new_tokens + max((len(row) for row in fed or ()), default=0)

    if model.mesh is not None:
        check_decoding(model.config, model.mesh, batch=_rows(prompts))
    started = time.perf_counter()
    if isinstance(prompts, Prefilled):
        if capacity is not None or chunk is not None:
            raise ValueError(f"capacity={capacity} and chunk={chunk} belong to prompts that are still to be read")
        if cache_dtype is not None:
            raise ValueError(f"{cache_dtype=} belongs to prompts that are still to be read")
        prefilled, begin_loop = prompts, start
        _check_capacity(prefilled.cache.capacity, int(prefilled.prompts.lengths.max()), room)
    else:
        options = {"capacity": capacity, "cache_dtype": cache_dtype, "implementation": implementation}
        options["chunk"] = 512 if chunk is None else chunk
        prefilled = read(model, params, prompts, policies=[policy], max_new_tokens=room, **options)
        reused = policy.method.keeps_cache and not layers_are_copied(prefilled.cache)
        begin_loop = _start_donating if reused else start
    lengths = np.asarray(prefilled.prompts.lengths)
    static = {"policy": policy, "sampling": sampling, "implementation": implementation}
    state, first = begin_loop(model, prefilled.cache, prefilled.prompts, jax.random.key(seed), **static)
    del prefilled  # donated, unless it is the caller's
    params = for_decoding(params)
    if fed is not None:
        state, first = _feed(model, params, state, fed, **static)
        lengths = lengths + np.array([len(row) for row in fed], np.int32)
    first_token, first_log_prob = jax.device_get(first)
    begun = time.perf_counter()
    outputs = [[int(token)] for token in first_token]
    log_probs = [[float(log_prob)] for log_prob in first_log_prob]
    enough = on_block is not None and bool(on_block([list(row) for row in outputs]))
    blocks, passes = list[Block](), list[Round]()
    correction = policy.correct_every
    uncorrected = Uncorrected(first_token, np.zeros((len(lengths), correction or 0), np.int32))
    remaining = max_new_tokens - 1
    drafting = {"draft": longest, "adapt": draft == "auto"}
    if lossless:
        state = begin_rounds(state, jnp.full(len(lengths), remaining, jnp.int32), **drafting)
    while remaining > 0 and not enough and bool(jnp.any(state.active)):
        if isinstance(state, LosslessState):  # which counts for itself, row by row
            rounds = max(1, block // (longest + 1))
            state, given = run_rounds(model, params, state, rounds=rounds, coverage=coverage, **drafting, **static)
            passes.append(jax.device_get(given))
            done = joined(passes[-1])
        else:
            limit = min(block, remaining, uncorrected.room or remaining)
            state, device_block = run_block(
                model, params, state, jnp.int32(limit), steps=block, stride=stride, coverage=coverage, **static
            )
            remaining -= limit
            done: Block = jax.device_get(device_block)
        blocks.append(done)
        if correction is not None:
            uncorrected.add(np.asarray(done.tokens), np.asarray(done.steps))
            if not uncorrected.room and remaining > 0:
                state = _correct(
                    model, params, state, *uncorrected.take(), policy=policy, implementation=implementation
                )
        gained = [done.tokens[: done.steps[row], row].tolist() for row in range(len(outputs))]
        for row, new in enumerate(gained):
            outputs[row] += new
            log_probs[row] += done.log_probs[: done.steps[row], row].tolist()
        enough = on_block is not None and bool(on_block(gained))
    jax.block_until_ready(state)
    decoded = time.perf_counter()
    return Generation(
        outputs,
        log_probs,
        ["eos" if row[-1] in model.config.eos_ids else "limit" for row in outputs],
        _telemetry(model, policy, lengths, blocks),
        begun - started,
        decoded - begun,
        _rounds(len(lengths), passes) if lossless else None,
    )


@on_its_mesh
def read(
    model: Llama,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    policies: Sequence[Policy] = (),
    capacity: int | None = None,
    chunk: int = 512,
    cache_dtype: CacheDtype | None = None,
    implementation: str | None = None,
) -> Prefilled:
    """Runs the prompts through the model, `chunk` tokens at a time, and keeps room for `max_new_tokens` more.

    `policies` are those that will go on from here, which must read prompts alike; those that begin with the last
    query of a prompt and its keys, as most do, need not be named.
    `capacity` is the number of cache slots per row (default: what prompt and answer need), rounded up to a multiple of
    128 and to where the last chunk of the longest prompt ends. `cache_dtype` "int8" stores keys and values with a
    scale per token and kv head, in half of bfloat16's bytes; None in the dtype of computation. Raises ValueError as
    `generate` does.
    """
    _at_least_one("chunk", chunk)
    tokens, lengths = pad(prompts, model.config.vocab, chunk)
    if capacity is None:
        capacity = int(lengths.max()) + max_new_tokens
    _check_capacity(capacity, int(lengths.max()), max_new_tokens)
    alignment = _ALIGNMENT * parts()
    capacity = -(-max(capacity, tokens.shape[1]) // alignment) * alignment
    return _read(
        model,
        params,
        tokens,
        lengths,
        capacity=capacity,
        chunk=chunk,
        prefill=_common_prefill(policies),
        observers=tuple(dict.fromkeys(observer for policy in policies for observer in policy.observers)),
        cache_dtype=cache_dtype,
        implementation=implementation,
    )


_read = jax.jit(
    read_prompts,
    static_argnames=("model", "capacity", "chunk", "prefill", "observers", "cache_dtype", "implementation"),
)


def _common_prefill(policies: Sequence[Policy]) -> PrefillAttention | None:
    ways = {policy.prefill: policy.name for policy in policies}
    if len(ways) > 1:
        raise ValueError(
            f"policies {', '.join(map(repr, ways.values()))} read prompts in different ways; read each alone"
        )
    return next(iter(ways), None)


def _start(
    model: Llama,
    cache: KVCache,
    prompts: PromptRecord,
    key: jax.Array,
    *,
    policy: Policy,
    sampling: Sampling,
    implementation: str | None,
) -> tuple[LoopState, tuple[Int[Array, " batch"], Float[Array, " batch"]]]:
    """The first selection, and the first token, which comes from the prefill's logits."""
    token, log_prob = everywhere(sample(sampling, prompts.logits, jax.random.fold_in(key, 0)))
    decode = begin(policy, Prefilled(cache, prompts), implementation=implementation)
    return LoopState(decode, token, ~is_eos(model, token), key), (token, log_prob)


start = jax.jit(_start, static_argnames=("model", "policy", "sampling", "implementation"))
# for a prefill that nobody else needs: its cache becomes the state's
_start_donating = jax.jit(
    _start, static_argnames=("model", "policy", "sampling", "implementation"), donate_argnames=("cache",)
)


def _feed(
    model: Llama,
    params: Params,
    state: LoopState,
    fed: Sequence[Sequence[int]],
    *,
    policy: Policy,
    sampling: Sampling,
    implementation: str | None,
) -> tuple[LoopState, tuple[Int[Array, " batch"], Float[Array, " batch"]]]:
    """The first token comes from the last fed one instead of the prompt's."""
    tokens, counts = pad(fed, model.config.vocab, 16, argument="fed")  # few lengths, few programs
    decode, logits = feed(model, params, state.decode, tokens, counts, policy=policy, implementation=implementation)
    token, log_prob = everywhere(sample(sampling, logits, jax.random.fold_in(state.key, decode.step)))
    return LoopState(decode, token, ~is_eos(model, token), state.key), (token, log_prob)


def _rows(prompts: Sequence[Sequence[int]] | Prefilled) -> int:
    return len(prompts.prompts.lengths) if isinstance(prompts, Prefilled) else len(prompts)


@functools.partial(
    jax.jit,
    static_argnames=("model", "policy", "sampling", "steps", "stride", "coverage", "implementation"),
    donate_argnames=("state",),
)
def run_block(
    model: Llama,
    params: Params,
    state: LoopState,
    limit: Int[Array, ""],
    *,
    policy: Policy,
    sampling: Sampling,
    steps: int,
    stride: int | None,
    coverage: bool,
    implementation: str | None,
) -> tuple[LoopState, Block]:
    """Up to `limit` steps (at most `steps`, the size of the buffers), fewer when all rows stop; nested loops when a
    `stride` is given."""

    def one_step(done, carry, kind):
        state, block = carry
        running = state.active & (done < limit)
        logits, decode, trace = decode_step(
            model,
            params,
            state.decode,
            state.token,
            policy=policy,
            active=running,
            kind=kind,
            coverage=coverage,
            implementation=implementation,
        )
        # keyed by the step and not by how often the loop ran, so that both loops draw alike
        token, log_prob = everywhere(sample(sampling, logits, jax.random.fold_in(state.key, decode.step)))
        token = jnp.where(running, token, state.token)
        block = Block(
            block.tokens.at[done].set(token),
            block.log_probs.at[done].set(log_prob),
            jax.tree.map(lambda buffer, value: buffer.at[done].set(value), block.trace, trace),
            block.steps + running,
        )
        active = state.active & ~(running & is_eos(model, token))
        return LoopState(decode, token, active, state.key), block

    def scheduled(carry):
        done, state, block = carry
        return done + 1, *one_step(done, (state, block), "scheduled")

    def cycle(carry, stride: int):
        done, state, block = carry
        state, block = lax.fori_loop(
            0, stride - 1, lambda i, inner: one_step(done + i, inner, "recycled"), (state, block)
        )
        return done + stride, *one_step(done + stride - 1, (state, block), "refresh")

    def unfinished(carry):
        done, state, _ = carry
        return (done < limit) & jnp.any(state.active)

    carry = (jnp.int32(0), state, empty_block(model, steps, state.token.shape[0]))
    body = scheduled if stride is None else functools.partial(cycle, stride=stride)
    _, state, block = lax.while_loop(unfinished, body, carry)
    return state, everywhere(block)


@functools.partial(jax.jit, static_argnames=("model", "policy", "implementation"), donate_argnames=("state",))
def _correct(
    model: Llama,
    params: Params,
    state: LoopState,
    tokens: Int[Array, "batch every"],
    counts: Int[Array, " batch"],
    *,
    policy: Policy,
    implementation: str | None,
) -> LoopState:
    decode = correct(model, params, state.decode, tokens, counts, implementation=implementation)
    assert decode.cache is not None
    kept = policy.method.corrected(decode.kept, decode.cache, implementation=implementation)
    return LoopState(DecodeState(decode.cache, decode.lengths, decode.step, kept), state.token, state.active, state.key)


def _nested_stride(policy: Policy) -> int:
    method = policy.method
    if not (isinstance(method, Recycling) and isinstance(method.schedule, FixedStride)):
        raise ValueError(f"loop='nested' needs a policy with a fixed stride, {policy.name!r} has none")
    return method.schedule.stride


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _check_capacity(capacity: int, prompt: int, max_new_tokens: int) -> None:
    if capacity < prompt + max_new_tokens:
        raise ValueError(
            f"capacity={capacity} is too small for a prompt of {prompt} tokens and max_new_tokens={max_new_tokens}: "
            f"{prompt + max_new_tokens} slots are needed"
        )


def pad(
    prompts: Sequence[Sequence[int]], vocab: int, chunk: int, *, argument: str = "prompts"
) -> tuple[Int[np.ndarray, "batch tokens"], Int[np.ndarray, " batch"]]:
    """Rows of token ids as one array, padded with zeros to a multiple of `chunk`, and their lengths.

    Raises ValueError, naming the `argument`, for no row, an empty one, and an id outside the vocabulary.
    """
    if not prompts:
        raise ValueError(f"{argument} is empty, expected at least one prompt")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"{argument}[{row}] is empty, expected at least one token")
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"{argument}[{row}] holds token id {outside[0]}, expected ids from 0 to {vocab - 1}")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // chunk) * chunk), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def _telemetry(model: Llama, policy: Policy, lengths: Int[np.ndarray, " batch"], blocks: list[Block]) -> Telemetry:
    parts = [empty_block(model, 0, len(lengths)), *blocks]
    steps = np.sum([np.asarray(block.steps) for block in parts], axis=0)
    trace = {
        name: np.concatenate([np.asarray(getattr(block.trace, name))[: np.max(block.steps)] for block in parts])
        for name in LayerTrace._fields
    }
    return Telemetry(model.config, policy, jnp.dtype(model.dtype).itemsize, lengths, steps, **trace)


def _rounds(batch: int, parts: list[Round]) -> Rounds:
    """Of the rounds that ran in some row."""
    none = np.zeros((0, batch), np.int32)
    ran = [np.any(part.accepted >= 0, axis=1) for part in parts]
    tallies = (field.name for field in fields(Rounds))
    return Rounds(
        **{
            name: np.concatenate([none, *(getattr(part, name)[rows] for part, rows in zip(parts, ran, strict=True))])
            for name in tallies
        }
    )
