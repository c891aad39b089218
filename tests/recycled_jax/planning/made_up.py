"""A small model and made-up figures of its programs."""

from recycled_jax.config import LlamaConfig
from recycled_jax.mesh import MeshSizes
from recycled_jax.planning.programs import ProgramMemory
from recycled_jax.planning.setting import Setting

SMALL = LlamaConfig(
    vocab=1024, embed=256, mlp=512, layers=2, query_heads=8, kv_heads=4, head_dim=128, max_length=131_072
)


def setting(**fields) -> Setting:
    values = {
        "config": SMALL,
        "topology": "v5e-4",
        "mesh": MeshSizes(data=1, tensor=4),
        "context": 4096,
        "batch": 2,
        "policy_name": "recycled",
        "knobs": {"k": 512, "stride": 8},
    }
    return Setting(**{**values, **fields})


def program(name: str = "prefill", **fields) -> ProgramMemory:
    values = {"weights": 10, "cache": 20, "selection": 5, "other": 3, "temporaries": 7, "results": 1, "seconds": 1.5}
    return ProgramMemory(name, **{**values, **fields})
