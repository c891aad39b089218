"""Floors of lossless rounds against arithmetic by hand."""

import pytest

from recycled_jax.mesh import MeshSizes
from recycled_jax.planning.floors import floors, weights_read
from recycled_jax.planning.lossless_floors import round_floor
from tests.recycled_jax.planning.made_up import setting

TOKEN = 2 * 4 * 128 * 2  # bytes of a token's key and value in one layer of the small model


def test_a_round_by_hand():
    one = setting(topology="v5e-1", mesh=MeshSizes(1))
    found, weights = round_floor(one, 8), weights_read(one)
    cache, selection = 2 * 2 * 4096 * TOKEN, 2 * 2 * 512 * TOKEN  # layers x rows x slots
    scores = 2 * 2 * 4 * 4096 * 4  # layers x rows x kv heads x slots x bytes, of one token
    assert found.drafts == 8 * (weights + selection)
    assert found.verification == weights + cache + 2 * selection + 9 * scores + scores
    assert found.full == floors(one).full
    assert found.speedup(8) == pytest.approx(9 * found.full / (found.drafts + found.verification))
    assert found.speedup(found.break_even) == pytest.approx(1)


def test_the_pass_attends_everything_even_where_refreshes_do_not():
    knobs = {"k": 512, "stride": 8}
    whole, keys = (setting(knobs={**knobs, "refresh": refresh}) for refresh in ("full", "selection"))
    assert round_floor(keys, 4) == round_floor(whole, 4)


@pytest.mark.parametrize("mesh", [MeshSizes(1, 1, 4), MeshSizes(1, 1, 2, 2), MeshSizes(2, 1, 2)])
def test_a_mesh_divides_the_scores(mesh):
    divided = setting(mesh=mesh)
    scores = 2 * 2 * 4 * 4096 * 4
    assert round_floor(divided, 8).verification == floors(divided).refresh + 10 * scores / 4


def test_refuses():
    with pytest.raises(ValueError, match="draft=0 must be at least 1 token"):
        round_floor(setting(), 0)
