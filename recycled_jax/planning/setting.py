"""What is planned: a model, a policy, a batch of contexts, and how they lie on a slice."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from recycled_jax.config import LlamaConfig
from recycled_jax.mesh import MeshSizes
from recycled_jax.planning.slices import Slice, find_slice
from recycled_jax.policies import Policy, make_policy
from recycled_jax.state import CacheDtype

CHUNK = 512  # tokens of a prompt that are read together
_ALIGNMENT = 128  # slots; `generate.read` rounds capacities up to it


@dataclass(frozen=True)
class Setting:
    """`context` counts the slots of each row, prompt and answer together. Weights and computation are in bfloat16.

    Raises ValueError, in one sentence, for a mesh that does not cover the devices or that divides what it cannot.
    """

    config: LlamaConfig
    topology: str
    mesh: MeshSizes
    context: int
    batch: int
    policy_name: str
    knobs: dict[str, Any] = field(default_factory=dict)
    cache_dtype: CacheDtype | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_mesh(self.config, self.slice, self.mesh, batch=self.batch)
        if self.cache_dtype is not None and self.mesh.sequence > 1:
            raise ValueError(
                f"cache_dtype={self.cache_dtype!r} is not for a mesh that divides slots, sequence={self.mesh.sequence}"
            )

    @property
    def slice(self) -> Slice:
        return find_slice(self.topology)

    @property
    def policy(self) -> Policy:
        return make_policy(self.policy_name, **self.knobs)

    @property
    def rows(self) -> int:
        """Rows of the batch on a device."""
        return self.batch // (self.mesh.data * self.mesh.fsdp)

    @property
    def prompt(self) -> int:
        """Columns of the padded prompt."""
        return -(-self.context // CHUNK) * CHUNK

    @property
    def capacity(self) -> int:
        """Slots of the cache, as `generate.read` rounds them up."""
        alignment = _ALIGNMENT * self.mesh.sequence
        return -(-self.prompt // alignment) * alignment

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.config.to_hf(), "mesh": asdict(self.mesh)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Setting":
        knobs = {name: tuple(knob) if isinstance(knob, list) else knob for name, knob in values["knobs"].items()}
        config, mesh = LlamaConfig.from_hf(values["config"]), MeshSizes(**values["mesh"])
        return cls(**{**values, "config": config, "mesh": mesh, "knobs": knobs})


def default_mesh(config: LlamaConfig, slice_: Slice, *, batch: int) -> MeshSizes:
    """As many devices as can be along `tensor`, which kv heads, MLP and vocabulary are divided by; of the rest as many
    as the batch is divisible by along `data`, the others along `sequence`."""
    common = math.gcd(config.kv_heads, config.mlp, config.vocab, slice_.devices)
    rest = slice_.devices // common
    data = math.gcd(rest, batch)
    return MeshSizes(data=data, tensor=common, sequence=rest // data)


def resolve(mesh: MeshSizes, slice_: Slice) -> MeshSizes:
    """`mesh` with a number in the place of -1. Raises ValueError where the sizes do not divide the devices."""
    sizes = asdict(mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if slice_.devices % fixed or (-1 not in sizes.values() and fixed != slice_.devices):
        raise ValueError(f"mesh={sizes} covers {fixed} devices, {slice_.name} has {slice_.devices}")
    return MeshSizes(**{name: slice_.devices // fixed if size == -1 else size for name, size in sizes.items()})


def check_mesh(config: LlamaConfig, slice_: Slice, mesh: MeshSizes, *, batch: int) -> None:
    """Raises ValueError for a mesh that is not one of the slice, or divides what cannot be divided evenly."""
    if resolve(mesh, slice_) != mesh:
        raise ValueError(f"mesh={asdict(mesh)} has a -1 in it, expected a number of devices")
    rows = mesh.data * mesh.fsdp
    if batch % rows:
        raise ValueError(f"mesh has data x fsdp = {rows}, expected a divisor of batch={batch}")
    for name in ("kv_heads", "mlp", "vocab"):
        if getattr(config, name) % mesh.tensor:
            raise ValueError(f"mesh has tensor={mesh.tensor}, expected a divisor of {name}={getattr(config, name)}")
    if config.embed % mesh.fsdp:
        raise ValueError(f"mesh has fsdp={mesh.fsdp}, expected a divisor of embed={config.embed}")


def at_context(setting: Setting, context: int) -> Setting:
    """The same at another context."""
    return replace(setting, context=context)
