"""How a policy is timed: each program compiled apart, warmed up and repeated, with all its outputs awaited.

Prefill includes the first selection and the first token (the time to first token). Decoding is the multi-step loop that
users run, every repeat from the same state: a block donates its state, and what it changed is put back outside the
timer.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from jaxtyping import Array, Int

from pallas_kernels import KVCache, on_mesh
from recycled_jax.decode import Params, read_prompts
from recycled_jax.frame import Dense, FixedStride, LastQueries, LayerTrace, Never, PromptRecord, Recycling
from recycled_jax.frame.prompt import DensePrefill
from recycled_jax.generate import Block, LoopState, pad, run_block, start
from recycled_jax.layers import for_decoding
from recycled_jax.model import Llama
from recycled_jax.policies import Policy
from recycled_jax.sampling import Sampling
from recycled_jax.state import model_cache

Clock = Callable[[], float]  # seconds, monotonic
_ALIGNMENT = 128  # slots; as `generate` rounds capacities


@dataclass(frozen=True)
class Repeats:
    """How often things run: `warmups` runs that do not count before `repeats` that do; a decode run is one block of
    `decode_steps` steps. Without `prefill_repeats` nobody reads the prompts: caches are made up of random numbers."""

    decode_steps: int
    repeats: int
    warmups: int
    prefill_repeats: int
    prefill_warmups: int


@dataclass(frozen=True)
class Workload:
    """What all candidates are timed at: prompts of one length, room for the block, no row that stops early."""

    model: Llama
    params: Params
    decoding: Params  # the same, as decode steps read them fastest
    tokens: Int[Array, "batch padded"]  # padded to whole chunks
    lengths: Int[Array, " batch"]
    chunk: int
    runs: Repeats

    @classmethod
    def of(cls, model: Llama, params: Params, prompts: Sequence[Sequence[int]], runs: Repeats) -> "Workload":
        """Raises ValueError as `generate.pad` does."""
        chunk = min(512, max(map(len, prompts)))
        tokens, lengths = pad(prompts, model.config.vocab, chunk)
        endless = model.clone(config=replace(model.config, eos_ids=()))
        return cls(endless, params, for_decoding(params), jnp.asarray(tokens), jnp.asarray(lengths), chunk, runs)

    @property
    def prompts(self) -> tuple[Any, ...]:
        """What reading them takes."""
        return self.params, self.tokens, self.lengths, jax.random.key(0)

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        """Slots per row of the cache: prompt, first token and block, the same for every candidate."""
        slots = max(int(self.lengths.max()) + self.runs.decode_steps + 1, self.tokens.shape[1])
        return -(-slots // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Measured:
    """What a candidate took, in milliseconds, an entry for each timed run; decoding per step, for the whole batch.

    No prefill where caches are made up. `full_step_ms` and `recycled_step_ms` are the two kinds of step alone, () where
    a candidate has none or they cannot be told apart. `trace` is that of a timed block, `[steps, layers, batch]`; None
    for a peer, which is dense. `peak_memory_bytes`: arguments, outputs and temporaries of the largest program, as the
    compiler counts them. `details` go into the record as they are.
    """

    prefill_ms: tuple[float, ...]
    decode_ms: tuple[float, ...]
    full_step_ms: tuple[float, ...] = ()
    recycled_step_ms: tuple[float, ...] = ()
    compile_s: float | None = None
    trace: LayerTrace | None = None
    peak_memory_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


Candidate = Callable[[Clock], Measured]


class Programs(NamedTuple):
    """The compiled programs of a policy; the two kinds of step are None where they cannot run alone."""

    prefill: Compiled
    decode: Compiled
    full_step: Compiled | None
    recycled_step: Compiled | None


class State(NamedTuple):
    """The shapes of a state before the first decode step, and where they lie."""

    leaves: list[jax.ShapeDtypeStruct]
    structure: Any


def prepare(workload: Workload, policy: Policy) -> Candidate:
    """Compiles the policy's programs, and returns what times them."""
    make = _read_and_begin if workload.runs.prefill_repeats else _make_up_and_begin
    sizes = {"capacity": workload.capacity, "chunk": workload.chunk, "implementation": None}
    structures = []

    def first_state(*prompts: Any) -> list[Array]:
        leaves, structure = jax.tree.flatten(make(workload.model, *prompts, policy=policy, **sizes))
        structures.append(structure)
        return leaves

    began = time.perf_counter()
    # In one program, so that the cache becomes the state's without a copy.
    lowered = jax.jit(first_state).lower(*workload.prompts)
    prefill = lowered.compile()
    compile_s = time.perf_counter() - began
    state = State(
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for leaf, place in zip(lowered.out_info, prefill.output_shardings, strict=True)
        ],
        structures[0],
    )
    began = time.perf_counter()
    decode = _block(workload, policy, state)
    compile_s += time.perf_counter() - began  # what a user waits for; the steps alone are ours
    kinds = [kind and _block(workload, kind, state) for kind in _kinds_of_step(policy)]
    return partial(_measure, workload, policy, Programs(prefill, decode, *kinds), state.structure, compile_s)


def spread(milliseconds: Sequence[float]) -> dict[str, float] | None:
    """Median with 10th and 90th percentile; None without a run."""
    if not milliseconds:
        return None
    return {f"p{q}": float(np.percentile(milliseconds, q)) for q in (10, 50, 90)}


def _read_and_begin(
    model: Llama,
    params: Params,
    tokens: Int[Array, "batch padded"],
    lengths: Int[Array, " batch"],
    key: jax.Array,
    *,
    policy: Policy,
    capacity: int,
    chunk: int,
    implementation: str | None,
) -> LoopState:
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
    options = {"policy": policy, "sampling": Sampling(), "implementation": implementation}
    state, _ = start(model, prefilled.cache, prefilled.prompts, key, **options)
    return state


def _make_up_and_begin(
    model: Llama,
    params: Params,
    tokens: Int[Array, "batch padded"],
    lengths: Int[Array, " batch"],
    key: jax.Array,
    *,
    policy: Policy,
    capacity: int,
    chunk: int,
    implementation: str | None,
) -> LoopState:
    """As if the prompts had been read, from keys, values and queries of random numbers."""
    del params, chunk
    others = [observer for observer in policy.observers if not isinstance(observer, LastQueries)]
    if others:
        raise ValueError(f"prefill_repeats=0 makes up caches, but {policy.name!r} needs of the prompts: {others[0]}")
    keys = map(jax.random.fold_in, itertools.repeat(key), itertools.count())
    config, sizes = model.config, {"batch": tokens.shape[0], "capacity": capacity, "dtype": model.dtype}

    def random(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), tree)

    watching = tuple(dict.fromkeys((LastQueries(1), *policy.observers)))
    observed = tuple(random(observer.start(config, **sizes)) for observer in watching)
    logits = jax.random.normal(next(keys), (tokens.shape[0], config.vocab))
    record = PromptRecord(lengths, logits, ((), *observed), (DensePrefill(), *watching), config)
    cache = on_mesh(random(model_cache(config, **sizes, implementation=implementation)))
    options = {"policy": policy, "sampling": Sampling(), "implementation": implementation}
    return start(model, cache, record, key, **options)[0]


def _block(workload: Workload, policy: Policy, state: State) -> Compiled:
    """`run_block` of the workload's steps: `program(params, leaves of the state, limit)`."""
    steps = workload.runs.decode_steps
    options = {"sampling": Sampling(), "steps": steps, "stride": None, "coverage": False, "implementation": None}

    def run(params: Params, leaves: list[Array], limit: Int[Array, ""]) -> tuple[LoopState, Block]:
        before = jax.tree.unflatten(state.structure, leaves)
        return run_block(workload.model, params, before, limit, policy=policy, **options)

    return jax.jit(run, donate_argnames="leaves").lower(workload.decoding, state.leaves, jnp.int32(steps)).compile()


def _kinds_of_step(policy: Policy) -> tuple[Policy | None, Policy | None]:
    """The policy refreshing at every step, and at none; None where that is the policy itself, or has no meaning."""
    method = policy.method
    if not isinstance(method, Recycling) or method.schedule.never:
        return None, None
    return (
        replace(policy, method=replace(method, schedule=FixedStride(1))),
        replace(policy, method=replace(method, schedule=Never())),
    )


def _measure(
    workload: Workload, policy: Policy, programs: Programs, structure: Any, compile_s: float, clock: Clock
) -> Measured:
    runs, prompts = workload.runs, workload.prompts
    prefill_ms, state = [], None
    for _ in range(runs.prefill_warmups + runs.prefill_repeats or 1):
        state = None  # the last run's cache goes before the next is made
        started = clock()
        leaves = jax.block_until_ready(programs.prefill(*prompts))
        prefill_ms.append(1e3 * (clock() - started))
        state = jax.tree.unflatten(structure, leaves)
        del leaves
    assert state is not None
    first, cache = _all_but_cache(state), state.decode.cache
    del state
    times = partial(_time_block, workload, first, clock)
    decode_ms, trace, cache = times(programs.decode, cache)
    full_ms, recycled_ms = (), ()
    if programs.full_step is not None and programs.recycled_step is not None:
        full_ms, _, cache = times(programs.full_step, cache)
        recycled_ms, _, cache = times(programs.recycled_step, cache)
    elif isinstance(policy.method, Dense):
        full_ms = decode_ms
    elif isinstance(policy.method, Recycling):  # whose schedule never refreshes
        recycled_ms = decode_ms
    return Measured(
        tuple(prefill_ms[runs.prefill_warmups :]) if runs.prefill_repeats else (),
        decode_ms,
        full_ms,
        recycled_ms,
        compile_s,
        trace,
        _peak_memory(programs.prefill, programs.decode),
    )


def _time_block(
    workload: Workload, first: LoopState, clock: Clock, program: Compiled, cache: KVCache | None
) -> tuple[tuple[float, ...], LayerTrace, KVCache | None]:
    """Milliseconds per step of each timed block, the last one's trace, and the cache, which the blocks took over."""
    runs = workload.runs
    limit, block, milliseconds = jnp.int32(runs.decode_steps), None, []
    for _ in range(runs.warmups + runs.repeats):
        leaves = jax.block_until_ready(jax.tree.leaves(_with_cache(_copy(first), cache)))
        with jax.transfer_guard("disallow"):
            started = clock()
            state, block = jax.block_until_ready(program(workload.decoding, leaves, limit))
            milliseconds.append(1e3 * (clock() - started) / runs.decode_steps)
        cache = state.decode.cache
    assert block is not None
    return tuple(milliseconds[runs.warmups :]), jax.device_get(block.trace), cache


# The cache is not copied to begin a block anew: slots from a row's length on are never read, whatever an earlier block
# has left in them, and none before it changes. So a benchmark needs no more memory than its users do.
def _all_but_cache(state: LoopState) -> LoopState:
    return _copy(_with_cache(state, None))


def _with_cache(state: LoopState, cache: KVCache | None) -> LoopState:
    return replace(state, decode=replace(state.decode, cache=cache))


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.copy(), tree)


def _peak_memory(*programs: Compiled) -> int | None:
    sizes = [size for program in programs if (size := program.memory_analysis()) is not None]
    return max(
        (
            size.argument_size_in_bytes + size.output_size_in_bytes + size.temp_size_in_bytes - size.alias_size_in_bytes
            for size in sizes
        ),
        default=None,
    )
