"""Compiles the programs of a generation for a TPU slice in this process: `python -m recycled_jax.planning.programs IN
OUT`.

Not for users: `compiling` starts it with the environment that the TPU compiler needs. IN is a `Setting` as JSON; OUT
gets what the compiler says of each program's memory.
"""

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recycled_jax.decode import begin, decode_step, read_prompts
from recycled_jax.frame import Prefilled
from recycled_jax.generate import LoopState, run_block
from recycled_jax.mesh import make_mesh
from recycled_jax.model import Llama
from recycled_jax.planning.setting import CHUNK, Setting
from recycled_jax.planning.sizes import DTYPE, params_of
from recycled_jax.sampling import Sampling
from recycled_jax.sharding import param_shardings

BLOCK = 64  # decode steps of the loop between two looks of the host
_FULL = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory")
_USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes on one device, by the compiler's memory analysis. Of the arguments, `weights`, `cache` and `selection` (all
    that the policy keeps) are what their shapes come to; the rest, padding to tiles included, is `other`. `results` are
    those that do not take the place of arguments. `seconds`: to trace and to compile.
    """

    name: str
    weights: int
    cache: int
    selection: int
    other: int
    temporaries: int
    results: int
    seconds: float
    implementations: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The most that a device holds while the program runs."""
        return self.weights + self.cache + self.selection + self.other + self.temporaries + self.results


@dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refuses for its memory: bytes that it wants and has, 0 where it does not tell."""

    name: str
    wanted: int
    available: int


def compile_all(setting: Setting) -> Iterator[ProgramMemory | TooLarge]:
    """Of the prefill, the first selection, a full and a recycled step, and the loop that users run; up to the first
    that is too large."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=setting.slice.topology)
    mesh = make_mesh(setting.mesh, topology.devices)
    # the abstract mesh tells the library what it is traced for
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield from _Programs(setting, mesh).compiled()


class _Programs:
    """The programs one after another: each begins where the last one has left its arrays."""

    def __init__(self, setting: Setting, mesh: Mesh):
        self.setting, self.mesh, self.policy = setting, mesh, setting.policy
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.model = Llama(setting.config, dtype=DTYPE, param_dtype=DTYPE, mesh=mesh)
        self.params = _placed(params_of(setting.config), param_shardings(setting.config, mesh))

    def compiled(self) -> Iterator[ProgramMemory | TooLarge]:
        setting = self.setting
        tokens, lengths = self.array((setting.batch, setting.prompt)), self.array((setting.batch,))
        prefilled = yield from self.compile("prefill", self.prefill, self.params, tokens, lengths)
        if prefilled is None:
            return
        cache, prompts = prefilled.cache, prefilled.prompts
        state = yield from self.compile("first selection", self.select, cache, prompts, donate=0)
        if state is None:
            return
        for name, kind in (("full step", "refresh"), ("recycled step", "recycled")):
            step = functools.partial(self.step, kind=kind)
            if (yield from self.compile(name, step, self.params, state, lengths, donate=1)) is None:
                return
        key = jax.eval_shape(lambda: jax.random.key(0))
        active = self.array((setting.batch,), jnp.bool_)
        shapes: Any = (lengths, active, self.array(key.shape, key.dtype))
        loop = LoopState(state, *shapes)
        yield from self.compile("decode loop", self.loop, self.params, loop, self.array(()), donate=1)

    def prefill(self, params, tokens, lengths):
        return read_prompts(
            self.model,
            params,
            tokens,
            lengths,
            capacity=self.setting.capacity,
            chunk=CHUNK,
            prefill=self.policy.prefill,
            observers=self.policy.observers,
            cache_dtype=self.setting.cache_dtype,
        )

    def select(self, cache, prompts):
        return begin(self.policy, Prefilled(cache, prompts))

    def step(self, params, state, token, *, kind):
        logits, state, _ = decode_step(self.model, params, state, token, policy=self.policy, kind=kind)
        return jnp.argmax(logits, axis=-1), state

    def loop(self, params, state, limit):
        options: dict[str, Any] = {"policy": self.policy, "sampling": Sampling(), "implementation": None}
        return run_block(self.model, params, state, limit, steps=BLOCK, stride=None, coverage=False, **options)

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.everywhere)

    def compile(self, name: str, function: Callable, *arguments: Any, donate: int | None = None) -> Any:
        """Yields the program's memory; returns its results as shapes in their places, or None if it is too large."""
        started = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=() if donate is None else donate).lower(*arguments)
        try:
            compiled = lowered.compile(dict(self.setting.slice.chip.compiler_options))
        except jax.errors.JaxRuntimeError as error:
            if not _FULL.search(str(error)):
                raise
            yield too_large(name, str(error))
            return None
        seconds = time.perf_counter() - started
        yield memory(name, arguments, compiled.memory_analysis(), compiled.as_text() or "", seconds)
        given = _placed(lowered.out_info, compiled.output_shardings)
        return given[1] if name.endswith("step") else given


def too_large(name: str, message: str) -> TooLarge:
    """What the compiler's message says."""
    found = _USED.search(message)
    if found is None:
        return TooLarge(name, 0, 0)
    wanted, available = (round(float(found[at]) * _UNITS[found[at + 1]]) for at in (1, 3))
    return TooLarge(name, wanted, available)


def memory(name: str, arguments: Any, found: Any, text: str, seconds: float) -> ProgramMemory:
    """Reads a memory analysis; `arguments` are shapes in their places."""
    parts = {"weights": 0, "cache": 0, "selection": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        part = part_of(jax.tree_util.keystr(path), first=name == "first selection")
        if part is not None:
            parts[part] += int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    return ProgramMemory(
        name,
        **parts,
        other=found.argument_size_in_bytes - sum(parts.values()),
        temporaries=found.temp_size_in_bytes,
        results=found.output_size_in_bytes - found.alias_size_in_bytes,
        seconds=seconds,
        implementations=tuple(sorted(set(re.findall(r'op_name="[^"]*?(\w+/(?:pallas_tpu|xla|divided))/', text)))),
    )


def part_of(path: str, *, first: bool) -> str | None:
    """Whether an argument is of the weights, the cache or what the policy keeps; `first`: the cache comes first."""
    if first:
        return "cache" if path.startswith("[0]") else None
    if "['params']" in path:
        return "weights"
    kinds = {".kept": "selection", ".cache": "cache"}
    return next((part for name, part in kinds.items() if name in path), None)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


if __name__ == "__main__":
    given, out = map(Path, sys.argv[1:])
    found = list(compile_all(Setting.from_json(json.loads(given.read_text()))))
    out.write_text(json.dumps({"programs": [asdict(program) for program in found]}))
