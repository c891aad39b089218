"""Generation on a mesh beside that of one device; `python -m tests.recycled_jax.on_a_mesh PORT INDEX OUT NAME ...` is
one of two processes, which together have the mesh's devices; the names are of policies."""

import json
import sys
from collections.abc import Sequence

import jax
import numpy as np

from recycled_jax.distributed import Distributed
from recycled_jax.generate import Generation, generate
from recycled_jax.mesh import MeshSizes, make_mesh
from recycled_jax.policies import Policy, make_policy
from recycled_jax.sharding import param_shardings
from tests.recycled_jax.random_model import prompts, tiny_model

LENGTHS = (900, 517, 30, 256, 129, 1, 640, 333)  # some prompts end in the first part of a cache, some in the last
POLICIES = {
    "full": {},
    "recycled": {"k": 24, "stride": 3},
    "recycled-dynamic": {"k": 24, "stride": 3},
    "streaming": {"k": 24},
    "tidal": {"k": 24, "dense_layers": (0,), "selection_layers": (1,)},
    "quest": {"k": 24, "page": 8, "dense_layers": (0,)},
}
MESHES = {
    "data 8": MeshSizes(data=8),
    "data 4 x tensor 2": MeshSizes(data=4, tensor=2),
    "sequence 8": MeshSizes(data=1, sequence=8),
    "tensor 2 x sequence 4": MeshSizes(data=1, tensor=2, sequence=4),
}


def policy(name: str) -> Policy:
    return make_policy(name, **POLICIES[name])


def rows(mesh: MeshSizes) -> list[list[int]]:
    """A row for each device, or two that all share."""
    return prompts(*LENGTHS[: 8 if mesh.data > 1 else 2])


def decode(policy: Policy, rows: Sequence[Sequence[int]], mesh: MeshSizes | None) -> Generation:
    model, params = tiny_model()
    if mesh is not None:
        model = model.clone(mesh=make_mesh(mesh))
        shardings = param_shardings(model.config, model.mesh)
        params = jax.tree.map(  # every process has all of them, and gives its devices their parts
            lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__),
            params,
            shardings,
        )
    return generate(model, params, rows, policy=policy, max_new_tokens=9, chunk=128, block=4)


def told(done: Generation) -> dict:
    """All that must not depend on where it was computed."""
    trace = done.telemetry
    return {
        "tokens": done.tokens,
        "log_probs": done.log_probs,
        "refreshed": np.asarray(trace.refreshed).tolist(),
        "attended": np.asarray(trace.attended).tolist(),
        "overlap": np.nan_to_num(trace.overlap, nan=-1.0).tolist(),
    }


def main(port: str, index: str, out: str, *names: str) -> None:
    Distributed(f"localhost:{port}", processes=2, process=int(index), heartbeat=30).join()
    found = {name: {} for name in names}
    for name in names:
        for mesh in ("data 4 x tensor 2", "tensor 2 x sequence 4"):
            found[name][mesh] = told(decode(policy(name), rows(MESHES[mesh]), MESHES[mesh]))
    with open(f"{out}.{index}", "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
