"""Slices, meshes and what is asked for."""

import json

import pytest

from recycled_jax.mesh import MeshSizes
from recycled_jax.planning.setting import Setting, default_mesh, resolve
from recycled_jax.planning.slices import SLICES, find_slice, larger
from recycled_jax.presets import PRESETS
from recycled_jax.weights import parameter_count
from tests.recycled_jax.planning.made_up import SMALL, setting


@pytest.mark.parametrize(
    ("name", "topology", "devices"),
    [("v5e-8", "v5e:2x4", 8), ("v5e-16", "v5e:4x4", 16), ("v5p-8", "v5p:2x2x1", 4), ("v5p-16", "v5p:2x2x2", 8)],
)
def test_a_slice_has_the_name_that_cloud_tpu_gives_it(name, topology, devices):
    found = find_slice(name)
    assert (found.topology, found.devices) == (topology, devices)


def test_an_unknown_slice_is_told_all_there_are():
    with pytest.raises(ValueError, match="topology='v5e-7' is not known; expected one of v5e-1, ") as error:
        find_slice("v5e-7")
    assert all(name in str(error.value) for name in SLICES)


def test_larger_slices_of_the_same_chip():
    assert [slice_.name for slice_ in larger(find_slice("v5p-32"))] == ["v5p-64", "v5p-128"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("llama-3.2-1b", 1.24),
        ("llama-3.2-3b", 3.21),
        ("qwen2-7b", 7.62),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name, billions):
    assert parameter_count(PRESETS[name]) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("model", "topology", "batch", "mesh"),
    [
        ("llama-3.1-8b", "v5e-8", 8, MeshSizes(1, 1, 8, 1)),
        ("llama-3.1-8b", "v5e-16", 8, MeshSizes(2, 1, 8, 1)),
        ("llama-3.1-8b", "v5e-16", 1, MeshSizes(1, 1, 8, 2)),
        ("llama-3.1-8b", "v5p-8", 8, MeshSizes(1, 1, 4, 1)),
        ("llama-3.1-70b", "v5p-16", 8, MeshSizes(1, 1, 8, 1)),
        ("qwen2-7b", "v6e-8", 8, MeshSizes(2, 1, 4, 1)),
        ("qwen2-7b", "v6e-16", 2, MeshSizes(2, 1, 4, 2)),
    ],
)
def test_the_mesh_of_a_preset(model, topology, batch, mesh):
    assert default_mesh(PRESETS[model], find_slice(topology), batch=batch) == mesh


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mesh": MeshSizes(data=4), "batch": 6}, "mesh has data x fsdp = 4, expected a divisor of batch=6"),
        ({"topology": "v5e-8", "mesh": MeshSizes(1, 1, 8)}, "mesh has tensor=8, expected a divisor of kv_heads=4"),
        ({"mesh": MeshSizes(2)}, "covers 2 devices, v5e-4 has 4"),
        ({"context": 0}, "context=0 must be at least 1"),
        (
            {"mesh": MeshSizes(1, 1, 2, 2), "cache_dtype": "int8"},
            "int8' is not for a mesh that divides slots, sequence=2",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        setting(**fields)


def test_a_free_axis_takes_the_devices_that_are_left():
    assert resolve(MeshSizes(-1, 1, 4), find_slice("v5e-16")) == MeshSizes(4, 1, 4, 1)
    with pytest.raises(ValueError, match="covers 3 devices, v5e-16 has 16"):
        resolve(MeshSizes(-1, 3), find_slice("v5e-16"))


def test_slots_are_rounded_up_as_for_generation():
    assert (setting(context=1000).prompt, setting(context=1000).capacity) == (1024, 1024)
    divided = setting(topology="v5e-16", mesh=MeshSizes(1, 1, 1, 16), context=1000)
    assert divided.capacity == 2048


def test_a_setting_survives_json():
    given = setting(policy_name="tidal", knobs={"dense_layers": (0,), "selection_layers": (1,)})
    assert Setting.from_json(json.loads(json.dumps(given.to_json()))) == given
    assert given.config == SMALL
