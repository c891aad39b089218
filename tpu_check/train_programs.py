"""The train steps of the pod configs, compiled for their pods: `python -m tpu_check.train_programs NAME OUT`.

Not for users: `tpu_check.pods` starts it with the environment that the TPU compiler needs. OUT gets the figures as
JSON.
"""

import functools
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from recycled_jax.config import LlamaConfig
from recycled_jax.mesh import make_mesh
from recycled_jax.model import Llama, causal
from recycled_jax.planning.chips import CHIPS, Chip
from recycled_jax.presets import PRESETS
from recycled_jax.weights import layer_weights
from tpu_check import hlo
from tpu_check.collectives import Collective, bytes_by_kind, collectives
from train.__main__ import parse
from train.config import TrainConfig
from train.data import Batch
from train.optimizer import make_optimizer
from train.step import abstract_state, batch_sharding, make_train_step

CONFIGS = Path(__file__).parent.parent / "configs" / "train"
AXES = ("data", "fsdp", "tensor", "sequence")


@dataclass(frozen=True)
class Pod:
    """A config and the slice of a pod that it is for. The checkpoint that it starts from is not there: `model` has its
    sizes."""

    name: str  # of the config
    model: LlamaConfig
    chip: Chip
    topology: str  # as the compiler calls it

    @property
    def devices(self) -> int:
        return math.prod(map(int, self.topology.split(":")[1].split("x")))

    @property
    def config(self) -> TrainConfig:
        return _config(self.name)


@functools.cache
def _config(name: str) -> TrainConfig:
    return parse(["--config", str(CONFIGS / f"{name}.yaml")])


PODS = {
    pod.name: pod
    for pod in (
        Pod("llama31_8b_recycled_v5p64", PRESETS["llama-3.1-8b"], CHIPS["v5p"], "v5p:4x4x4"),
        Pod("llama31_8b_recycled_v5e256", PRESETS["llama-3.1-8b"], CHIPS["v5e"], "v5e:16x16"),
        Pod("qwen2_7b_recycled_v6e64", PRESETS["qwen2-7b"], CHIPS["v6e"], "v6e:8x8"),
    )
}


@dataclass(frozen=True)
class PodFigures:
    """What the compiler says of one train step; bytes and operations are those of one device.

    `flops` and `estimate_seconds` are of its cost analysis, which takes a loop's body for one run of it and knows
    nothing of Pallas calls; `matrix_flops` and `attention_flops` are counted by hand. `collectives`: bytes by kind.
    `largest`: the exchanges with most bytes. `replicated`: arrays as large as a matrix of a layer that lie whole on
    every device. `gathered`: exchanges that put a table as large as the embedding on every device. `implementations`:
    `operation/name` of what ran.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    flops: float
    matrix_flops: float
    attention_flops: float
    estimate_seconds: float
    collectives: dict[str, int]
    largest: list[str]
    replicated: list[str]
    gathered: list[str]
    implementations: list[str]
    lower_seconds: float
    compile_seconds: float

    @property
    def memory(self) -> int:
        """The most that a device holds: results that take the place of arguments count once."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


def compile_pod(pod: Pod) -> PodFigures:
    """The figures of the train step of a pod's config, at its last stage: the longest rows."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=pod.topology)
    config = pod.config
    mesh = make_mesh(config.mesh, topology.devices)
    started = time.perf_counter()
    # The abstract mesh tells the library what it is traced for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered, taken = _lower(pod, config, mesh)
    lowered_at = time.perf_counter()
    compiled = lowered.compile(dict(pod.chip.compiler_options))
    seconds = lowered_at - started, time.perf_counter() - lowered_at
    placed = [(taken, compiled.input_shardings[0]), (lowered.out_info, compiled.output_shardings)]
    whole = [name for arrays, shardings in placed for name in replicated(pod.model, arrays, shardings)]
    cost = compiled.cost_analysis() or {}
    return figures(pod, config, compiled.as_text() or "", compiled.memory_analysis(), cost, whole, seconds)


def _lower(pod: Pod, config: TrainConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The train step, and the abstract arrays that it takes."""
    model = Llama(
        pod.model,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        attention=config.model.cca or config.model.recycled or causal,
    )
    optimizer = make_optimizer(config.optimizer, pod.model, config.steps, ema=config.ema)
    stage, rows = config.stages[-1], batch_sharding(mesh)
    fields = Batch(*(np.empty((stage.batch, stage.length), kind) for kind in ("int32", "int32", "float32", "bool")))
    batch = jax.tree.map(lambda field: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=rows), fields)
    taken = (abstract_state(model, optimizer, mesh), batch)
    step = make_train_step(model, optimizer, mesh, accumulate=stage.accumulate, z_loss=config.z_loss)
    return step.lower(*taken), taken


def figures(
    pod: Pod,
    config: TrainConfig,
    text: str,
    memory: Any,
    cost: dict[str, float],
    whole: list[str],
    seconds: tuple[float, float],
) -> PodFigures:
    """Reads a compiled step: its HLO `text`, `memory` and `cost` analysis; `whole` arrays are replicated."""
    found = collectives(hlo.parse(text))
    largest = sorted(found, key=lambda exchange: -exchange.size * exchange.times)
    return PodFigures(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        cost.get("flops", math.nan),
        matrix_flops(pod.model, config) / pod.devices,
        attention_flops(pod.model, config) / pod.devices,
        cost.get("optimal_seconds", math.nan),
        bytes_by_kind(found),
        [told(exchange) for exchange in largest[:8]],
        whole,
        [told(exchange) for exchange in table_gathers(found, pod.model)],
        sorted(set(re.findall(r'op_name="[^"]*?(\w+/(?:pallas_tpu|xla|reference))/', text))),
        *seconds,
    )


def matrix_flops(model: LlamaConfig, config: TrainConfig) -> float:
    """Of the products with weights, in one step on all devices: one forward, two backward, and in the layers one more
    where they are computed again; for each, an addition and a multiplication for every element and token."""
    stage = config.stages[-1]
    layer = sum(math.prod(weight.shape) for weight in layer_weights(model).values() if weight.inputs)
    again = 1 if config.remat == "full" else 0
    return 2 * stage.batch * stage.length * ((3 + again) * model.layers * layer + 3 * model.vocab * model.embed)


def attention_flops(model: LlamaConfig, config: TrainConfig) -> float:
    """Of the attention kernels, in one step on all devices: 2 products forward, as many again where a layer is computed
    again, and 7 backward (the kernels for queries and for keys both need logits and their gradients); half of each is
    masked."""
    stage = config.stages[-1]
    products = 2 + 7 + (0 if config.remat == "none" else 2)
    return products * stage.batch * model.layers * model.query_heads * model.head_dim * stage.length**2


def replicated(model: LlamaConfig, arrays: Any, shardings: Any) -> Iterator[str]:
    """Names of the arrays with as many elements as the smallest matrix of a layer that lie whole on every device."""
    smallest = min(math.prod(weight.shape) for weight in layer_weights(model).values() if weight.inputs)
    placed = dict(jax.tree_util.tree_leaves_with_path(shardings))
    for path, array in jax.tree_util.tree_leaves_with_path(arrays):
        if math.prod(array.shape) >= smallest and placed[path].is_fully_replicated:
            yield f"{jax.tree_util.keystr(path)}{list(array.shape)}"


def table_gathers(found: list[Collective], model: LlamaConfig) -> list[Collective]:
    """The exchanges after which every device has a table of vocabulary x embedding."""
    table = model.vocab * model.embed
    return [exchange for exchange in found if exchange.kind == "all-gather" and exchange.elements >= table]


def told(exchange: Collective) -> str:
    """An exchange in words."""
    return f"{exchange.kind} {exchange.size / 1e6:.1f} MB x {exchange.times} of {exchange.scope or exchange.name}"


if __name__ == "__main__":
    name, out = sys.argv[1:]
    Path(out).write_text(json.dumps(asdict(compile_pod(PODS[name]))))
