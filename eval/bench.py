"""The speed benchmark: lengths × batches × policies × budgets, each between two runs of the dense policy.

Every line of bench.jsonl holds what a policy took, beside the dense policy of the same process, what its steps had to
move, and the floor that follows. A run that was interrupted goes on where it stopped. When the two dense runs around a
policy differ by more than 5 %, the machine was not quiet: the line is void (`valid` false), and the next run of the
same command measures it again.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from eval import peer_hf, random_llama
from eval.config import Named, chosen
from eval.provenance import commit, provenance
from eval.random_llama import RandomLlama
from eval.step_bytes import bandwidth, dense_bytes, observed_bytes, weights_read
from eval.timing import Candidate, Clock, Measured, Repeats, Workload, prepare, spread
from pallas_kernels.dispatch import kernels_by_default
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.config import LlamaConfig
from recycled_jax.decode import Params
from recycled_jax.frame import FixedStride, LayerTrace, Recycling
from recycled_jax.mesh import MeshSizes, check_decoding, make_mesh
from recycled_jax.model import Llama
from recycled_jax.policies import Policy, make_policy
from recycled_jax.sharding import param_shardings
from recycled_jax.tasks.prose import generated_sentences

MOST_DRIFT = 0.05  # between the medians of two dense runs, before what lies between them is void
PEER = "hf"  # its policy in the records
_DENSE = make_policy("full")
# Two records that agree in these are of the same configuration.
IDENTITY = (
    "model", "dtype", "policy", "force_stride", "implementation", "mode", "length", "batch", "decode_steps", "repeats",
    "warmups", "prefill_repeats",
)  # fmt: skip


@dataclass(frozen=True)
class RandomModel:
    """A model of random weights.

    Args:
        random: Its sizes.
    """

    random: RandomLlama


@dataclass(frozen=True)
class BenchConfig:
    """What is timed, and how often.

    Args:
        out: Folder for bench.jsonl, and for the checkpoint of a random model if a peer has to read it.
        model: Folder of a checkpoint, or name of a model in the local Hugging Face cache; `random` with sizes for
            random weights; the embedded model when not given.
        dtype: Of weights, cache and computation.
        lengths: Tokens of the prompts; a line for each.
        batches: Rows decoded together; a line for each. What does not fit the memory is recorded so.
        policies: Names, or mappings like {name: recycled, stride: 10}.
        budgets: Values of the knob `k` that every policy runs with which has it and does not set it.
        decode_steps: Decode steps in a timed run.
        repeats: Timed runs.
        warmups: Runs before them that do not count.
        prefill_repeats: Timed runs of reading the prompts, in each run of a policy. With 0 and random weights nobody
            reads them: caches are made up of random numbers, and decoding alone is timed.
        prefill_warmups: Runs before them that do not count.
        peer: Another library to time beside, `hf` for Hugging Face transformers; none when not given.
        force_stride: Every policy that has a schedule refreshes after so many steps, whatever its queries say.
        mesh: Devices that the model lies on: rows over `data`, heads over `tensor`, the cache of a row over `sequence`;
            one device when not given. Bytes and floors are then those of one device.
    """

    out: Path
    model: str | RandomModel | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    batches: tuple[int, ...] = (1,)
    policies: tuple[Named, ...] = ("recycled",)
    budgets: tuple[int, ...] = (1024,)
    decode_steps: int = 128
    repeats: int = 10
    warmups: int = 3
    prefill_repeats: int = 10
    prefill_warmups: int = 3
    peer: Literal["hf"] | None = None
    force_stride: int | None = None
    mesh: MeshSizes | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "batches", "budgets"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}={list(values)} must hold numbers of at least 1")
        for name in ("decode_steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("warmups", "prefill_repeats", "prefill_warmups"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.prefill_repeats == 0 and not isinstance(self.model, RandomModel):
            raise ValueError("prefill_repeats=0 makes up caches, which is for random weights; expected at least 1")
        if self.mesh is not None and self.peer is not None:
            raise ValueError(f"peer={self.peer!r} runs on one device; leave it or mesh out")

    @property
    def runs(self) -> Repeats:
        return Repeats(self.decode_steps, self.repeats, self.warmups, self.prefill_repeats, self.prefill_warmups)


@dataclass(frozen=True)
class Subject:
    """The model that is timed; `prompts(batch, length)` gives rows of tokens, `folder` is what a peer reads."""

    name: str
    weights: Literal["real", "random"]
    model: Llama
    params: Params
    prompts: Callable[[int, int], list[list[int]]]
    folder: Path | None


@dataclass(frozen=True)
class Entry:
    """A policy of the grid: its knobs as the record tells them, and the policy itself; None for a peer."""

    told: dict[str, Any]
    policy: Policy | None


Prepare = Callable[[Workload, Policy], Candidate]


def bench(config: BenchConfig, *, clock: Clock = time.perf_counter, prepare: Prepare = prepare) -> Path:
    """Runs what is missing of the grid, appending a line for each cell to `out`/bench.jsonl; returns its path.

    Raises ValueError for a policy or knob that does not exist, for random weights under a schedule that looks at
    queries, and as `peer_hf.load` does; errors while measuring, other than a lack of memory, go through.
    """
    entries = _entries(config)
    if config.mesh is None:
        return _bench(config, entries, None, clock, prepare)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return _bench(config, entries, mesh, clock, prepare)


def _bench(config: BenchConfig, entries: list[Entry], mesh: Mesh | None, clock: Clock, prepare: Prepare) -> Path:
    subject = _subject(config, mesh)
    peer = None
    if config.peer is not None:
        assert subject.folder is not None
        peer = peer_hf.load(subject.folder, config.dtype)
        entries.append(Entry({"name": PEER}, None))
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "bench.jsonl"
    done, rate = _done(path), bandwidth()
    common = _common(config, subject, rate)
    grid = list(itertools.product(config.lengths, config.batches))
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(grid) * len(entries), unit="cell") as progress:
        for length, batch in grid:
            cell = common | {"length": length, "batch": batch}
            missing = [entry for entry in entries if _identity(cell | {"policy": entry.told}) not in done]
            progress.update(len(entries) - len(missing))
            if not missing:
                continue
            progress.set_description(f"{length} tokens × {batch}")
            workload = Workload.of(subject.model, subject.params, subject.prompts(batch, length), config.runs)
            cell["capacity"] = workload.capacity
            candidates = [
                partial(peer_hf.measure, peer, workload)
                if peer is not None and entry.policy is None
                else _compiled_once(prepare, workload, entry.policy or _DENSE)
                for entry in missing
            ]
            dense = _compiled_once(prepare, workload, _DENSE)
            for entry, (measured, around) in zip(missing, _between(dense, candidates, clock), strict=True):
                figures = _figures(workload, entry.policy, measured, around, rate[0])
                record = cell | {"policy": entry.told, "date": provenance()["date"]} | figures
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                progress.update()
    return path


def _entries(config: BenchConfig) -> list[Entry]:
    """The policies of the grid with each of the budgets that apply."""
    entries = []
    for one in chosen(config.policies, config.budgets):
        if one.policy.correct_every is not None:
            raise ValueError(
                f"policies has {one.name!r} with correct_every={one.policy.correct_every}, whose corrections are not "
                "timed; leave it out"
            )
        policy = _with_stride(one.policy, config.force_stride)
        if isinstance(config.model, RandomModel) and "query-check" in policy.method.axes.schedule:
            raise ValueError(
                f"policies has {one.name!r}, whose schedule looks at queries, and those of random weights mean "
                "nothing; give a force_stride or a model"
            )
        entries.append(Entry({"name": one.name} | one.knobs, policy))
    return entries


def _with_stride(policy: Policy, stride: int | None) -> Policy:
    method = policy.method
    if stride is None or not isinstance(method, Recycling) or method.schedule.never:
        return policy
    return replace(policy, method=replace(method, schedule=FixedStride(stride)))


def _subject(config: BenchConfig, mesh: Mesh | None) -> Subject:
    if isinstance(config.model, RandomModel):
        sizes = config.model.random
        folder = random_llama.write(config.out, sizes) if config.peer else None
        _check_mesh(config, sizes.config, mesh)
        network, params = random_llama.make(sizes, config.dtype)
        if mesh is not None:
            network, params = network.clone(mesh=mesh), jax.device_put(params, param_shardings(network.config, mesh))

        def any_tokens(batch: int, length: int) -> list[list[int]]:
            return np.random.default_rng(0).integers(0, sizes.vocab, (batch, length)).tolist()

        return Subject(sizes.name, "random", network, params, any_tokens, folder)
    checkpoint = Checkpoint.find(config.model)
    _check_mesh(config, checkpoint.config, mesh)
    network, params = checkpoint.load(config.dtype, mesh)

    def prose(batch: int, length: int) -> list[list[int]]:
        rows = []
        for row in range(batch):
            tokens = checkpoint.text.encode(" ".join(generated_sentences(np.random.default_rng(row), length // 4 + 1)))
            rows.append((tokens * -(-length // len(tokens)))[:length])
        return rows

    name = "embedded" if config.model is None else Path(config.model).name
    return Subject(name, "real", network, params, prose, checkpoint.folder)


def _check_mesh(config: BenchConfig, sizes: LlamaConfig, mesh: Mesh | None) -> None:
    if mesh is not None:
        for batch in config.batches:
            check_decoding(sizes, mesh, batch=batch)


def _common(config: BenchConfig, subject: Subject, rate: tuple[float, str]) -> dict[str, Any]:
    """What all records of a run share."""
    origin = provenance()
    device = {"kind": jax.devices()[0].device_kind, "machine": origin["device"]["machine"]}
    sizes = {"data": 1, "tensor": 1} if subject.model.mesh is None else dict(subject.model.mesh.shape)
    device |= {"chips": math.prod(sizes.values()), "mesh": sizes, "hbm_tb_s": rate[0] / 1e12, "bandwidth_from": rate[1]}
    return {
        "schema": 1,
        "kind": "measured",
        "git": commit(),
        "versions": origin["versions"] | {"libtpu": _version("libtpu")},
        "device": device,
        "model": subject.name,
        "weights": subject.weights,
        "dtype": config.dtype,
        "force_stride": config.force_stride,
        "implementation": "pallas_tpu" if kernels_by_default() else "xla",
        "mode": "gather",
        "decode_steps": config.decode_steps,
        "repeats": config.repeats,
        "warmups": config.warmups,
        "prefill_repeats": config.prefill_repeats,
        "command": origin["command"],
    }


def _compiled_once(prepare: Prepare, workload: Workload, policy: Policy) -> Candidate:
    """Compiles when it is first timed, so that a lack of memory shows there."""
    ready = cache(partial(prepare, workload, policy))
    return lambda clock: ready()(clock)


def _between(
    dense: Candidate, candidates: Sequence[Candidate], clock: Clock
) -> Iterator[tuple[Measured | None, list[Measured]]]:
    """Each candidate and the dense runs before and after it, each of those shared by two neighbours. None for what does
    not fit the memory, which leaves fewer dense runs."""
    before = _if_it_fits(dense, clock)
    for candidate in candidates:
        measured = _if_it_fits(candidate, clock)
        if measured is None or before is None:
            yield measured, [run for run in [before] if run is not None]
            continue
        after = _if_it_fits(dense, clock)
        yield measured, [run for run in [before, after] if run is not None]
        before = after


def _if_it_fits(candidate: Candidate, clock: Clock) -> Measured | None:
    try:
        return candidate(clock)
    except (MemoryError, RuntimeError) as error:
        lacking = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")  # XLA, CUDA, PyTorch on CPU
        if isinstance(error, MemoryError) or any(words in str(error) for words in lacking):
            return None
        raise


def _figures(
    workload: Workload, policy: Policy | None, measured: Measured | None, dense: list[Measured], rate: float
) -> dict[str, Any]:
    """The figures of a record; `rate` in bytes per second."""
    config, steps = workload.model.config, workload.runs.decode_steps
    element, prompts = jnp.dtype(workload.model.dtype).itemsize, np.asarray(workload.lengths)
    mesh = {} if workload.model.mesh is None else workload.model.mesh.shape
    shared = math.prod(mesh.get(axis, 1) for axis in ("fsdp", "tensor"))
    weights = weights_read(config, workload.params, batch=workload.batch, shards=shared)
    shards = math.prod(mesh.values())
    of_dense = dense_bytes(config, prompts, steps=steps, weights=weights, element=element, shards=shards)
    around = _around(dense)
    if measured is None:
        return {"status": "oom", "valid": False, "dense": around}
    trace, moved = measured.trace, of_dense
    if trace is not None and policy is not None:
        moved = observed_bytes(config, policy, trace, prompts, weights=weights, element=element, shards=shards)
    prefill, decode = spread(measured.prefill_ms), spread(measured.decode_ms)
    assert decode is not None
    floor_ms = 1e3 * moved.total / rate
    return {
        "status": "ok",
        "valid": around is None or _quiet(around["drift"]),
        "compile_s": measured.compile_s,
        "prefill_ms": prefill,
        "decode_ms_per_step": decode,
        "full_step_ms": spread(measured.full_step_ms),
        "recycled_step_ms": spread(measured.recycled_step_ms),
        "end_to_end_ms": prefill["p50"] + steps * decode["p50"] if prefill else None,
        "tokens_per_s": 1e3 * workload.batch / decode["p50"],
        "dense": around,
        "ratio_decode": around["decode_ms_per_step"]["p50"] / decode["p50"] if around else None,
        "ratio_prefill": around["prefill_ms"]["p50"] / prefill["p50"]
        if prefill and around and _quiet(around["prefill_drift"])
        else None,
        "bytes_per_step": moved.to_json(),
        "floor_ms": floor_ms,
        "mbu": floor_ms / decode["p50"],
        "ideal_speedup": of_dense.total / moved.total,
        "effective_stride": [1.0] * config.layers if trace is None else _effective_stride(trace),
        "peak_memory_bytes": measured.peak_memory_bytes,
        **measured.details,
    }


def _around(dense: list[Measured]) -> dict[str, Any] | None:
    """The dense runs together, and how far apart their medians are; None when dense does not fit the memory."""
    if not dense:
        return None
    prefills, decodes = [run.prefill_ms for run in dense], [run.decode_ms for run in dense]
    return {
        "prefill_ms": spread(sum(prefills, ())),
        "decode_ms_per_step": spread(sum(decodes, ())),
        "drift": _drift(decodes),
        "prefill_drift": _drift(prefills),
    }


def _quiet(drift: float | None) -> bool:
    return drift is None or drift <= MOST_DRIFT


def _drift(runs: Sequence[Sequence[float]]) -> float | None:
    medians = [float(np.median(run)) for run in runs if run]
    return max(medians) / min(medians) - 1 if len(medians) > 1 else None


def _effective_stride(trace: LayerTrace) -> list[float | None]:
    """Decode steps per refresh in each layer, over all rows; None where none happened."""
    refreshed = np.asarray(trace.refreshed)
    steps, _, rows = refreshed.shape
    return [steps * rows / count if count else None for count in refreshed.sum(axis=(0, 2)).tolist()]


def _identity(record: Mapping[str, Any]) -> str:
    device = record["device"]
    told = {name: record.get(name) for name in IDENTITY} | {"device": device["kind"], "mesh": device["mesh"]}
    return json.dumps(told, sort_keys=True)


def _done(path: Path) -> set[str]:
    """Identities of the records that stand; a torn last line is cut off the file."""
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    records = [json.loads(line) for line in whole.splitlines()]
    return {_identity(record) for record in records if record["valid"] or record["status"] == "oom"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
