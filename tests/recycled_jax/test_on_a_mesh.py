"""Decoding on a mesh: the tokens, selections and log-probabilities of one device."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Divided
from recycled_jax.decode import decode_step
from recycled_jax.extending import extend, repeat_rows
from recycled_jax.generate import generate, read, start
from recycled_jax.mesh import MeshSizes, make_mesh
from recycled_jax.policies import make_policy
from recycled_jax.sampling import Sampling
from recycled_jax.sharding import automatic, param_shardings
from tests.recycled_jax import on_a_mesh
from tests.recycled_jax.on_a_mesh import MESHES, POLICIES
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model
from tpu_check import hlo
from tpu_check.collectives import collectives

# The others run in `make test-slow`.
EVERY_TIME = [("recycled", "data 4 x tensor 2"), *((name, "tensor 2 x sequence 4") for name in POLICIES)]
CASES = [
    pytest.param(name, mesh, marks=() if (name, mesh) in EVERY_TIME else pytest.mark.slow)
    for name in POLICIES
    for mesh in MESHES
]


@functools.cache
def on_one_device(name: str, count: int) -> dict:
    return on_a_mesh.told(on_a_mesh.decode(on_a_mesh.policy(name), prompts(*on_a_mesh.LENGTHS[:count]), None))


def assert_same(ours: dict, theirs: dict, *, atol: float = 1e-5) -> None:
    assert ours["tokens"] == theirs["tokens"]
    for name in ("refreshed", "attended", "overlap"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)
    for one, other in zip(ours["log_probs"], theirs["log_probs"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_gives_what_one_device_gives(name, mesh):
    sizes = MESHES[mesh]
    rows = on_a_mesh.rows(sizes)
    ours = on_a_mesh.told(on_a_mesh.decode(on_a_mesh.policy(name), rows, sizes))
    assert_same(ours, on_one_device(name, len(rows)))


@pytest.mark.parametrize("names", [["recycled"], pytest.param(list(POLICIES), marks=pytest.mark.slow)])
def test_two_processes_give_what_one_device_gives(tmp_path, names):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    four = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    command = [sys.executable, "-m", "tests.recycled_jax.on_a_mesh", str(port)]
    children = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path / "told"), *names],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "XLA_FLAGS": four},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=300 * len(names))[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outputs
    for index in range(2):
        told = json.loads((tmp_path / f"told.{index}").read_text())
        assert list(told) == names
        for name, meshes in told.items():
            for ours in meshes.values():
                assert_same(ours, on_one_device(name, len(ours["tokens"])))


def on(sizes: MeshSizes | None):
    model, params = tiny_model()
    if sizes is None:
        return model, params
    mesh = make_mesh(sizes)
    return model.clone(mesh=mesh), jax.device_put(params, param_shardings(CONFIG, mesh))


def test_prompts_are_read_on():
    """Over more slots than there were, which moves them between the parts."""
    policy, rows, suffixes = make_policy("recycled", k=24, stride=3), prompts(500, 37), prompts(20, 9, seed=2)

    def go_on(sizes):
        model, params = on(sizes)
        prefilled = read(model, params, rows, policies=[policy], max_new_tokens=4, chunk=128)
        more = extend(model, params, repeat_rows(prefilled, [1, 0]), suffixes, max_new_tokens=9, chunk=16)
        assert more.cache.capacity > prefilled.cache.capacity
        assert isinstance(more.cache, Divided) == (sizes is not None)
        return generate(model, params, more, policy=policy, max_new_tokens=9, block=4)

    assert_same(*(on_a_mesh.told(go_on(sizes)) for sizes in (MESHES["tensor 2 x sequence 4"], None)))


def test_an_int8_cache_gives_what_it_gives_on_one_device():
    policy, rows = make_policy("recycled", k=24, stride=3), prompts(300, 37, 5, 129)
    options = {"policy": policy, "max_new_tokens": 9, "chunk": 128, "block": 4, "cache_dtype": "int8"}
    sizes = MeshSizes(data=2, tensor=2, fsdp=2)
    ours, alone = (on_a_mesh.told(generate(*on(which), rows, **options)) for which in (sizes, None))
    assert_same(ours, alone, atol=1e-3)  # what lies in the middle between two multiples may become either


def test_no_cache_moves_between_devices():
    """A decode step over 8 parts exchanges candidates, what was selected, and partial results."""
    model, params = on(MeshSizes(data=1, sequence=8))
    policy, rows = make_policy("recycled", k=24, stride=3), prompts(900, 517)
    prefilled = read(model, params, rows, policies=[policy], max_new_tokens=8, chunk=128)
    assert isinstance(prefilled.cache, Divided)
    parts = {shard.data.shape[3] for shard in prefilled.cache.whole.k.addressable_shards}
    assert parts == {prefilled.cache.capacity // 8}

    with jax.set_mesh(automatic(model.mesh)):
        options = {"policy": policy, "sampling": Sampling(), "implementation": None}
        state, _ = start(model, prefilled.cache, prefilled.prompts, jax.random.key(0), **options)
        leaves, structure = jax.tree.flatten(state.decode)

        def step(params, leaves, token):
            return decode_step(model, params, jax.tree.unflatten(structure, leaves), token, policy=policy)

        compiled = jax.jit(step, donate_argnums=1).lower(params, leaves, jnp.zeros(2, jnp.int32)).compile()
    text = compiled.as_text()
    exchanged = collectives(hlo.parse(text))
    batch, heads, query_heads, width, k = 2, CONFIG.kv_heads, CONFIG.query_heads, CONFIG.head_dim, 24
    partial_results = batch * query_heads * (2 + width) * 4
    candidates = 8 * 2 * batch * heads * k * 4
    selected = 2 * batch * heads * k * width * 4
    of_layer = partial_results + candidates + selected
    slack = 4 * batch * (CONFIG.vocab + CONFIG.embed) + 4096  # what is not of attention, and flags
    total = sum(exchange.size * exchange.times for exchange in exchanged)
    assert 0 < total <= CONFIG.layers * of_layer + slack
    of_cache = batch * heads * prefilled.cache.capacity * width // 8  # elements of one part of a layer's keys
    assert max(exchange.elements for exchange in exchanged) < of_cache


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        (MeshSizes(data=4, tensor=2), 3, "mesh has data x fsdp = 4, expected a divisor of the 3 rows of the batch"),
        (MeshSizes(data=2, tensor=4), 2, "mesh has tensor=4, expected a divisor of kv_heads=2"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(sizes, count, message):
    model, params = tiny_model()
    model = model.clone(mesh=make_mesh(sizes))
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts(*range(1, count + 1)), policy=make_policy("full"), max_new_tokens=2)
