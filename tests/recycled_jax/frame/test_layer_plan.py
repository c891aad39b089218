"""Layer plans: roles, runs, and plans that do not fit."""

import pytest

from recycled_jax.frame import LayerPlan


def test_every_layer_selects_unless_told_otherwise():
    assert list(LayerPlan().runs(4)) == [("select", range(4))]


def test_runs_of_tidal_decode():
    plan = LayerPlan(dense=(0, 1), select=(2, 5))
    assert list(plan.runs(8)) == [
        ("dense", range(2)),
        ("select", range(2, 3)),
        ("follow", range(3, 5)),
        ("select", range(5, 6)),
        ("follow", range(6, 8)),
    ]


def test_dense_layers_may_lie_anywhere():
    assert LayerPlan(dense=(0, 2), select=(1,)).roles(4) == ["dense", "select", "dense", "follow"]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"dense": (0, 4)}, "layer 4 is in the layer plan, the model has layers 0 to 3"),
        ({"select": (0, -1)}, "layer -1 is in the layer plan, the model has layers 0 to 3"),
        ({"dense": (0,), "select": (2,)}, "layer 1 is neither a dense nor a selection layer"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit(plan, said):
    with pytest.raises(ValueError, match=said):
        LayerPlan(**plan).roles(4)


def test_a_layer_has_one_role():
    with pytest.raises(ValueError, match="layer 2 is among the dense layers and among the selection layers"):
        LayerPlan(dense=(1, 2), select=(2, 3))
