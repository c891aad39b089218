"""What fits, and the nearest change that does. A device's memory is made as small as the test needs."""

from dataclasses import replace

import pytest

from recycled_jax.mesh import MeshSizes
from recycled_jax.planning import fitting
from recycled_jax.planning.fitting import available, largest_batch, nearest_change, needed
from recycled_jax.planning.sizes import sizes
from tests.recycled_jax.planning.made_up import setting


@pytest.fixture
def room(monkeypatch):
    """Sets what a device holds."""
    return lambda bytes: monkeypatch.setattr(fitting, "available", lambda setting: bytes)


def test_a_chip_keeps_some_memory_for_itself():
    asked = setting()
    assert 0.9 * asked.slice.chip.hbm < available(asked) < asked.slice.chip.hbm


def test_the_largest_batch_just_fits(room):
    asked = setting(batch=4)
    for batch in (2, 4, 7):
        room(needed(replace(asked, batch=batch)))
        assert largest_batch(asked) == batch
        room(needed(replace(asked, batch=batch)) - 1)
        assert largest_batch(asked) == batch - 1


def test_the_largest_batch_is_one_that_the_mesh_divides(room):
    asked = setting(mesh=MeshSizes(2, 1, 2), batch=2)
    room(needed(replace(asked, batch=6)) + sizes(asked).cache // 2)
    assert largest_batch(asked) == 6


def test_temporaries_grow_with_the_batch_and_do_not_shrink(room):
    asked, temporaries = setting(batch=2), 1_000_000
    room(needed(replace(asked, batch=4)) + 2 * temporaries)
    assert largest_batch(asked, temporaries) == 4
    room(needed(replace(asked, batch=1)) + temporaries - 1)
    assert largest_batch(asked, temporaries) == 0


def test_another_mesh_comes_first(room):
    asked = setting(mesh=MeshSizes(2, 1, 2))  # the weights are on each device twice as large as they need be
    room(needed(replace(asked, mesh=MeshSizes(1, 1, 4))))
    change = nearest_change(asked)
    assert change is not None
    assert "--mesh '{data: 1, tensor: 4}' fits (" in str(change)
    assert "by arithmetic, not compiled" in str(change)


def test_then_fewer_rows(room):
    asked = setting(batch=8)
    room(needed(replace(asked, batch=3)))
    change = nearest_change(asked)
    assert change is not None
    assert change.words == "--batch 3 instead of 8"
    assert needed(change.setting) <= fitting.available(asked)


def test_then_a_cache_of_int8(room):
    asked = setting(batch=1)
    room(needed(replace(asked, cache_dtype="int8")))
    change = nearest_change(asked)
    assert change is not None
    assert change.words == "--cache-dtype int8"


def test_then_a_larger_slice(room):
    asked = setting(batch=1, context=65_536)
    larger = replace(asked, topology="v5e-16", mesh=MeshSizes(1, 1, 4, 4))
    room(needed(larger))
    change = nearest_change(asked)
    assert change is not None
    assert change.words == "--topology v5e-16"


def test_there_may_be_none(room):
    room(1)
    assert nearest_change(setting()) is None
