"""What is drawn is what happened: positions against the methods' own states, and every picture against its numbers."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from recycled_jax.decode import begin, decode_step
from recycled_jax.generate import generate, read
from recycled_jax.plots import (
    Recording,
    decode_times,
    new_figure,
    record,
    recovered_attention,
    scores_against_bytes,
    selected_positions,
    selection_lifetimes,
)
from recycled_jax.plots.schedule import ages
from recycled_jax.plots.selections import binned
from recycled_jax.plots.style import DENSE, GUIDE
from recycled_jax.policies import make_policy
from recycled_jax.telemetry import Telemetry
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

RECYCLED = make_policy("recycled", k=8, stride=3, pool=1)
STEPS = 7


@pytest.fixture(scope="module")
def prefilled():
    """Two prompts, of 40 and 25 tokens."""
    return read(*tiny_model(), prompts(40, 25), max_new_tokens=STEPS + 1, chunk=16)


@pytest.fixture(scope="module")
def generated(prefilled):
    return generate(*tiny_model(), prefilled, policy=RECYCLED, max_new_tokens=STEPS + 1, coverage=True)


@pytest.fixture(scope="module")
def recording(prefilled, generated) -> Recording:
    return record(*tiny_model(), prefilled, generated.tokens, policy=RECYCLED)


def made_up(refreshed, coverage=None, policy=RECYCLED) -> Telemetry:
    """One row after a prompt of 10 tokens; the trace is [steps, layers]."""
    refreshed = np.array(refreshed, bool)[:, :, None]
    zeros = np.zeros(refreshed.shape)
    coverage = zeros * np.nan if coverage is None else np.array(coverage, float)[:, :, None]
    config = replace(CONFIG, layers=refreshed.shape[1])
    counts = np.array([10]), np.array([len(refreshed)])
    return Telemetry(config, policy, 4, *counts, refreshed, refreshed, zeros, zeros, zeros, zeros, coverage)


def curves(axes) -> list[list[tuple[float, float]]]:
    """The points of every line with a datum, rounded; those of one that is empty or a guide are left out."""
    lines = [line for line in axes.get_lines() if line.get_gid() != GUIDE and len(line.get_xdata())]
    return [[(float(x), round(float(y), 6)) for x, y in np.asarray(line.get_xydata())] for line in lines]


def image(axes) -> np.ndarray:
    [mesh] = [artist for artist in axes.get_children() if isinstance(artist, QuadMesh)]
    return np.ma.filled(mesh.get_array(), np.nan)


def test_a_recording_of_generated_text_is_the_generation(generated, recording):
    for name in ("steps", "prompt_lengths", "requested", "refreshed", "attended", "scored"):
        np.testing.assert_array_equal(getattr(recording.telemetry, name), getattr(generated.telemetry, name))
    for name in ("similarity", "overlap", "coverage"):
        np.testing.assert_allclose(
            getattr(recording.telemetry, name), getattr(generated.telemetry, name), rtol=1e-4, atol=1e-5
        )
    assert recording.telemetry.policy == RECYCLED


def test_held_is_what_the_selections_hold(prefilled, generated, recording):
    """Against the state of recycling itself, of which the recording knows nothing."""
    model, params = tiny_model()
    state = jax.jit(begin, static_argnames="policy")(RECYCLED, prefilled)
    step = jax.jit(decode_step, static_argnames=("model", "policy"))
    for place in range(STEPS):
        token = np.array([row[place] for row in generated.tokens], np.int32)
        _, state, _ = step(model, params, state, token, policy=RECYCLED)
        expected = np.zeros_like(recording.held[place])
        for (layer, row, _, _), slot in np.ndenumerate(np.asarray(state.kept.selection.positions)):
            expected[layer, row, slot] += 1 / CONFIG.kv_heads if slot >= 0 else 0
        np.testing.assert_allclose(recording.held[place], expected, atol=1e-6)
    assert recording.held.shape == (STEPS, CONFIG.layers, 2, 40 + STEPS)
    np.testing.assert_allclose(recording.held.sum(-1), 8, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "selecting"),
    [
        (make_policy("full"), []),
        (make_policy("quest", k=16, page=4), [2]),
        (make_policy("streaming", k=8, keep_cache=False), [0, 1, 2]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_other_methods_and_ragged_text(prefilled, generated, policy, selecting):
    """Also of methods that keep no selection, or no cache; a row that ends sooner holds nothing from then on."""
    tokens = [generated.tokens[0][:5], generated.tokens[1][:3]]
    found = record(*tiny_model(), prefilled, tokens, policy=policy, coverage=policy.method.keeps_cache)
    assert found.telemetry.steps.tolist() == [4, 2] and len(found.held) == 4
    expected = np.zeros((4, CONFIG.layers, 2))
    expected[:, selecting] = found.telemetry.attended[:, selecting]
    expected[2:, :, 1] = 0
    np.testing.assert_allclose(found.held.sum(-1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[1, 2]]}, "tokens has 1 rows, expected 2, one for each prompt"),
        ({"tokens": [[1], []]}, "tokens has no row of 2 tokens or more"),
        ({"tokens": [[1] * 100, [1]]}, "tokens needs 139 slots, the prompts were read with 128"),
        ({"policy": replace(RECYCLED, correct_every=6)}, "policy 'recycled' corrects the cache every 6 steps"),
    ],
)
def test_recordings_that_cannot_be_made(prefilled, change, message):
    arguments = {"tokens": [[1, 2], [1, 2]], "policy": RECYCLED, **change}
    with pytest.raises(ValueError, match=message):
        record(*tiny_model(), prefilled, arguments.pop("tokens"), **arguments)


def test_selected_positions(recording):
    figure = new_figure(8, 6)
    panels = selected_positions(figure, recording, row=1, marked={"fact": 12}, bins=100)
    assert "recycled; triangles: refreshes" in figure.get_supxlabel()
    assert [axes.get_title(loc="left") for axes in panels] == ["layer 0", "layer 1", "layer 2"]
    for layer, axes in enumerate(panels):
        shown, held = image(axes).T, recording.held[:, layer, 1]
        for step in range(STEPS):  # prompt, present token, and those of earlier steps
            np.testing.assert_allclose(shown[step, : 26 + step], held[step, : 26 + step])
            assert np.isnan(shown[step, 26 + step :]).all()
        assert curves(axes) == [[(3.0, 1.02), (6.0, 1.02)]]
        assert [text.get_text() for text in axes.texts] == ["◂ fact"]


def test_selected_positions_of_some_layers_without_refresh_or_selection(recording):
    refreshed = recording.telemetry.refreshed.copy()
    refreshed[:, 2] = False
    still = replace(recording, telemetry=replace(recording.telemetry, refreshed=refreshed))
    figure = new_figure(11, 6)
    panels = selected_positions(figure, still, layers=[2, 0, 1])
    assert [axes.get_title(loc="left") for axes in panels] == ["layer 2", "layer 0", "layer 1"]
    assert curves(panels[0]) == [] and curves(panels[1]) == [[(3, 1.02), (6, 1.02)]] and not panels[0].texts
    figure.canvas.draw()
    assert min(axes.get_position().height for axes in panels) > 0.2  # the layout has found room for all
    [axes] = selected_positions(new_figure(8, 3), replace(still, held=still.held * 0), layers=[0])
    assert [text.get_text() for text in axes.texts] == ["no selection of positions"]


def test_bins_are_means_over_slots_in_use():
    held = np.array([[1, 0, 1, 1, 1], [1, 0, 1, 0, 0.5]])
    shares, edges = binned(held, np.array([3, 5]), 3)
    np.testing.assert_array_equal(edges, [0, 2, 4, 5])
    np.testing.assert_array_equal(shares, [[0.5, 1, np.nan], [0.5, 0.5, 0.5]])


def test_ages_by_hand():
    refreshed = np.array([[0, 1], [0, 0], [1, 0], [0, 0], [1, 0]], bool)
    np.testing.assert_array_equal(ages(refreshed).T, [[1, 2, 0, 1, 0], [0, 1, 2, 3, 4]])


def test_selection_lifetimes():
    often, never = [[0, 1], [1, 1], [0, 1], [1, 1]], [[0, 0], [0, 1], [0, 0], [0, 0]]
    first, second, strides = selection_lifetimes(new_figure(9, 3), {"a": made_up(often), "b": made_up(never)})
    np.testing.assert_array_equal(image(first), [[1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(image(second), [[1, 2, 3, 4], [1, 0, 1, 2]])
    # of the second, layer 0 never refreshes: an open triangle at all four steps
    assert curves(strides) == [[(0, 2), (1, 1)], [(0, 4), (1, 4)], [(0, 4)]]
    assert strides.get_lines()[-1].get_marker() == "^"


def test_recovered_attention():
    dense, nan = made_up([[1], [1]], policy=make_policy("full")), np.nan
    selecting = made_up([[1, 1, 1]] * 2, [[0.5, nan, 0.7], [0.3, nan, 0.1]])
    by_step, by_layer = recovered_attention(new_figure(9, 3), {"full": dense, "a": selecting})
    assert curves(by_step) == [[(1, 0.6), (2, 0.2)]]
    assert curves(by_layer) == [[(0, 0.4), (2, 0.4)]]
    with pytest.raises(ValueError, match="telemetries hold no coverage, expected some measured with coverage=True"):
        recovered_attention(new_figure(9, 3), {"full": dense})


def test_decode_times():
    seconds = {"full": {1024: 0.004, 4096: 0.009}, "a": {1024: 0.004, 4096: 0.006}, "b": {2048: 0.001}}
    figure = new_figure(6, 3)
    [axes] = decode_times(figure, seconds, dense="full", origin="made up")
    assert curves(axes) == [[(1024, 4), (4096, 9)], [(1024, 4), (4096, 6)], [(2048, 1)]]
    assert [text.get_text() for text in axes.texts] == ["1.0×", "1.5×"]
    assert axes.get_lines()[0].get_color() == DENSE and figure.get_supxlabel() == "made up"


def test_scores_against_bytes():
    scores = {"full": {"x": 1.0, "y": 0.5}, "a": {"x": 0.25}}
    figure = new_figure(6, 3)
    [axes] = scores_against_bytes(figure, scores, {"full": 4e6, "a": 1e6}, dense="full")
    assert curves(axes) == [[(4, 100)], [(4, 50)], [(1, 25)]]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["full", "a", "x", "y"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda figure, r: selected_positions(figure, r, row=2), "row=2 is not in the batch, expected a row from 0 to"),
        (lambda figure, r: selected_positions(figure, r, layers=[3]), "layers holds 3, expected layers from 0 to 2"),
        (lambda figure, r: selection_lifetimes(figure, {}), "telemetries is empty, expected at least one"),
        (lambda figure, r: recovered_attention(figure, {"a": r.telemetry}, row=-1), "row=-1 is not in the batch"),
    ],
)
def test_bad_arguments(recording, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(new_figure(4, 3), recording)
