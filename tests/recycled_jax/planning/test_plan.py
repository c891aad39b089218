"""Plans from made-up compiles: what they conclude, and how they are told."""

import json

import pytest

from recycled_jax.planning import fitting
from recycled_jax.planning.fitting import needed
from recycled_jax.planning.plan import make_plan
from recycled_jax.planning.programs import TooLarge
from recycled_jax.planning.report import document, draw, table
from recycled_jax.planning.sizes import sizes
from tests.recycled_jax.planning.made_up import program, setting

HELD = sizes(setting())
LOOP = program("decode loop", weights=HELD.weights, cache=HELD.cache, selection=HELD.selection, temporaries=10**6)


def compiled(setting):
    return [program("prefill"), LOOP]


def test_a_plan_that_fits():
    made = make_plan(setting(), [1024, 4096], compiled)
    assert made.fits
    assert made.change is None
    assert made.point.temporaries == LOOP.total - HELD.total
    assert [point.setting.context for point in made.points] == [1024, 4096]
    assert made.points[0].floors.full < made.points[1].floors.full


def test_what_does_not_fit_by_shapes_is_not_compiled(monkeypatch):
    less = setting(batch=1)
    monkeypatch.setattr("recycled_jax.planning.plan.available", lambda setting: needed(less))
    monkeypatch.setattr(fitting, "available", lambda setting: needed(less))
    made = make_plan(setting(), [], lambda setting: pytest.fail("compiled"))
    assert not made.fits
    assert made.problem.startswith("context=4096 with batch=2 does not fit v5e-4: it needs 0.0 of 17.2 GB per device; ")
    assert "--batch 1 instead of 2 fits (0.0 GB per device, by arithmetic, not compiled)" in made.problem


def test_what_the_compiler_refuses_does_not_fit():
    found = [LOOP, TooLarge("decode loop", 20 * 2**30, 16 * 2**30)]
    made = make_plan(setting(), [], lambda setting: found)
    assert not made.fits
    assert "the compiler refuses the decode loop: it needs 21.5 of 17.2 GB per device; " in made.problem
    assert made.programs == (LOOP,)


def test_a_table_says_what_it_is():
    text = table(make_plan(setting(), [1024, 4096], compiled))
    assert "facts of compiled programs and floors, not measurements" in text
    row = next(line for line in text.splitlines() if line.startswith("prefill")).split()
    assert row[1:] == ["0.00"] * 7 + ["0%"]
    assert "refresh every 8 steps" in text
    assert "largest batch that fits on this mesh: " in text
    assert sum(line.startswith(("1,024 ", "4,096 ")) for line in text.splitlines()) == 2


def test_a_context_beyond_training_is_told():
    text = table(make_plan(setting(context=262_144, batch=1), [], compiled))
    assert "The model was trained for 131,072 tokens, fewer than the context." in text


def test_json_has_the_compilers_bytes():
    told = json.loads(json.dumps(document(make_plan(setting(), [1024], compiled), "0.0"), allow_nan=False))
    assert told["programs"][1]["total"] == LOOP.total
    assert told["bytes"] == {"weights": HELD.weights, "cache": HELD.cache, "selection": HELD.selection}
    assert (told["fits"], told["problem"]) == (True, None)
    assert told["sweep"][0]["context"] == 1024
    assert told["floor_bytes"]["stride"] == 8


def test_json_of_a_policy_that_never_refreshes():
    made = make_plan(setting(policy_name="snapkv", knobs={"k": 512}), [], compiled)
    assert json.loads(json.dumps(document(made, "0.0"), allow_nan=False))["floor_bytes"]["stride"] is None
    assert "never refreshes" in table(made)


@pytest.mark.parametrize("contexts", [[], [1024, 2048, 4096]])
def test_a_picture(tmp_path, contexts):
    draw(make_plan(setting(), contexts, compiled), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
