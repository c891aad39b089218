"""How the prompts of a batch are read."""

import numpy as np
import pytest

from eval import answer
from eval.cells import make_cells
from eval.config import EvalConfig, chosen
from eval.prompts import Prompts
from recycled_jax.commands.loading import Checkpoint
from tests.recycled_jax.tiny import save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint.find(str(save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1)))


def test_a_context_of_several_questions_is_read_once(checkpoint, monkeypatch):
    config = EvalConfig(tasks=("rs_multiturn",), preset="small", lengths=(512,), examples=2, chunk=128)
    [cell] = make_cells(config, Prompts(checkpoint.text, "fingerprint", "none"), 512)
    questions = [cell.question(line) for line in range(1, 5)]  # two turns of one context, two of the next
    assert len({question.tokens for question in questions}) == 2
    model, params = checkpoint.load("float32")
    rows_read = []

    def read(model, params, rows, **options):
        rows_read.append(len(rows))
        return plain_read(model, params, rows, **options)

    plain_read = answer.read
    monkeypatch.setattr(answer, "read", read)
    of = (cell, questions, chosen(["full"], ()), config)
    shared = answer.read_questions(model, params, *of)
    assert rows_read == [2]
    apart = plain_read(
        model,
        params,
        [question.tokens for question in questions],
        max_new_tokens=1,
        capacity=shared.cache.capacity,
        chunk=config.chunk,
    )
    assert np.asarray(shared.prompts.lengths).tolist() == [len(question.tokens) for question in questions]
    np.testing.assert_allclose(shared.prompts.logits, apart.prompts.logits, atol=1e-5)
    np.testing.assert_allclose(shared.cache.keys(0), apart.cache.keys(0), atol=1e-5)
