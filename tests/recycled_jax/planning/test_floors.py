"""Floors against arithmetic by hand, and against the figures that the project has published."""

import math

import pytest

from recycled_jax.mesh import MeshSizes
from recycled_jax.planning.floors import floors, weights_read
from recycled_jax.planning.setting import Setting
from recycled_jax.planning.sizes import sizes, weight_bytes
from recycled_jax.presets import PRESETS
from tests.recycled_jax.planning.made_up import SMALL, setting

TOKEN = 2 * 4 * 128 * 2  # bytes of a token's key and value in one layer of the small model


def one_device(**fields) -> Setting:
    return setting(topology="v5e-1", mesh=MeshSizes(1), **fields)


def test_floors_by_hand():
    found, weights = floors(one_device()), weights_read(one_device())
    cache, selection = 2 * 2 * 4096 * TOKEN, 2 * 2 * 512 * TOKEN  # layers x rows x slots
    assert found.full == weights + cache
    assert found.recycled == weights + selection
    assert found.refresh == weights + cache + 2 * selection
    assert found.mean == pytest.approx((7 * found.recycled + found.refresh) / 8)
    assert found.speedup == pytest.approx(found.full / found.mean)


def test_a_refresh_of_scores_alone_reads_keys_alone():
    knobs = {"k": 512, "stride": 8, "refresh": "selection"}
    found, whole = floors(one_device(knobs=knobs)), floors(one_device())
    assert whole.refresh - found.refresh == 2 * 2 * 4096 * TOKEN / 2


def test_a_device_of_a_mesh_moves_its_part():
    whole = floors(one_device())
    for mesh in (MeshSizes(1, 1, 4), MeshSizes(1, 1, 2, 2), MeshSizes(2, 1, 2)):
        part, weights = floors(setting(mesh=mesh)), weights_read(setting(mesh=mesh))
        assert part.full - weights == (whole.full - weights_read(one_device())) / 4
    divided = setting(mesh=MeshSizes(1, 1, 2, 2))  # every part of the slots keeps the selection
    assert floors(divided).recycled - weights_read(divided) == (whole.recycled - weights_read(one_device())) / 2


def test_of_an_embedding_that_is_no_head_only_rows_are_read():
    assert weight_bytes(SMALL, MeshSizes(1)) - weights_read(one_device()) == (1024 - 2) * 256 * 2


def test_int8_reads_half_and_its_scales():
    plain, small = floors(one_device()), floors(one_device(cache_dtype="int8"))
    assert plain.full - small.full == 2 * 2 * 4096 * (TOKEN - 2 * 4 * (128 + 4))
    assert small.recycled == plain.recycled


def test_what_never_refreshes_has_the_recycled_step_as_its_mean():
    found = floors(one_device(policy_name="snapkv", knobs={"k": 512}))
    assert (found.stride, found.mean) == (math.inf, found.recycled)


@pytest.mark.parametrize(("context", "published"), [(32_768, 1.2), (131_072, 2.0)])
def test_the_ideal_speed_ups_of_llama_8b_that_the_project_has_published(context, published):
    """Recycled over full at batch 1, on one device: weights are the limit. The published ones count the embedding
    table, of which a step reads one row, among the weights."""
    fields = {"config": PRESETS["llama-3.1-8b"], "context": context, "batch": 1, "knobs": {"k": 4096, "stride": 10}}
    found = floors(one_device(**fields))
    table = 128_255 * 4096 * 2
    assert (found.full + table) / (found.recycled + table) == pytest.approx(published, abs=0.05)
    assert found.limit == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(
    ("policy", "said"), [("full", "'full' has no recycled steps"), ("h2o", "'h2o' has no recycled")]
)
def test_what_does_not_recycle_has_no_plan(policy, said):
    with pytest.raises(ValueError, match=said):
        floors(setting(policy_name=policy, knobs={}))


def test_sizes_of_a_device():
    found = sizes(setting())
    assert found.weights == weight_bytes(SMALL, MeshSizes(1, 1, 4))
    assert found.cache == 2 * 2 * 4096 * TOKEN // 4
    compact, positions = 2 * 2 * 512 * TOKEN // 4, 2 * 2 * 512 * 4
    assert 0 < found.selection - compact - positions < 0.02 * compact  # what the schedule remembers
    divided = sizes(setting(mesh=MeshSizes(1, 1, 1, 4)))
    assert (divided.cache, divided.selection > compact) == (found.cache, True)
