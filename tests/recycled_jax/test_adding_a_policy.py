"""The page on adding a policy, run as it stands."""

import re
from pathlib import Path

import pytest

from recycled_jax import cli
from recycled_jax.generate import generate
from recycled_jax.policies import POLICIES, make_policy
from tests.recycled_jax.policies.numpy_llama import NumpyLlama
from tests.recycled_jax.policies.record import run
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_policy.md"
RAGGED = prompts(29, 2, 40)


@pytest.fixture
def page(monkeypatch):
    """The names that the page's code defines, its policy registered for the test."""
    module, line, oracle = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"POLICIES": dict(POLICIES), "__name__": "value_aware"}
    for code in (module, line, oracle):
        exec(compile(code, str(PAGE), "exec"), names)
    monkeypatch.setitem(POLICIES, "value-aware", names["POLICIES"]["value-aware"])
    return names


def test_the_policy_of_the_page_equals_its_oracle(page):
    knobs = {"k": 8, "stride": 4, "sinks": 3}
    generation, selections = run(make_policy("value-aware", **knobs), RAGGED, 16)
    _, params = tiny_model()
    for row, prompt in enumerate(RAGGED):
        oracle = page["NumpyValueAware"](**knobs)
        assert generation.tokens[row] == NumpyLlama(CONFIG, params, oracle).generate(prompt, 16)
        for layer, buffers in oracle.buffers.items():
            assert selections[row][layer][-1] == [sorted(s for s in buffer if s is not None) for buffer in buffers]


def test_it_is_known_everywhere(page, capsys):
    assert cli.main(["policies", "value-aware"]) == 0
    printed = capsys.readouterr().out
    assert "value-aware" in printed and "arXiv 2406.12335" in printed and "--policy.stride: int = 10" in printed
    with pytest.raises(ValueError, match=r"policy\.strid is not a knob of 'value-aware'; did you mean 'stride'"):
        make_policy("value-aware", strid=3)


def test_a_budget_above_the_length_is_full_attention(page):
    model, params = tiny_model()
    options = {"max_new_tokens": 16, "chunk": 16}
    ours = generate(model, params, RAGGED, policy=make_policy("value-aware", k=64), **options)
    assert ours.tokens == generate(model, params, RAGGED, policy=make_policy("full"), **options).tokens
