"""Every block of Python in the documentation runs, in the order and in the one session in which a reader types them.

Where a page says `path/to/NAME`, the test has a folder of that name with a tiny random model in it, so no word of the
code is changed. What a page leaves to its reader to bring is in `GIVEN`.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from recycled_jax.policies import POLICIES
from tests.docs.pages import PAGES, blocks, name
from tests.recycled_jax.tiny import save_tiny

GIVEN: dict[str, Any] = {
    "documents": ["A long document.", "Another one, which is longer than the first."],
    "prompts": [[5, 6, 7, 8], [9, 10, 11]],
    "POLICIES": dict(POLICIES),  # a line of docs/adding_a_policy.md goes into the registry's dictionary
}
PAGES_WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Heads as the meshes of the pages divide them, and the length that README's budget and answer ask for."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_tiny(folder / "tiny", vocab=260, embed=64, query_heads=8, kv_heads=4, max_length=8192)


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=name)
def test_runs(page, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in set(re.findall(r"path/to/[\w.-]+", "".join(code.text for code in blocks(page, "python")))):
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        Path(folder).symlink_to(checkpoint)
    session: dict[str, Any] = {"__name__": "session", **GIVEN}
    for code in blocks(page, "python"):
        # the line numbers of a traceback are those of the page
        exec(compile("\n" * (code.line - 1) + code.text, name(page), "exec"), session)


def test_nothing_is_given_that_no_page_leaves_out():
    code = "".join(code.text for page in PAGES_WITH_PYTHON for code in blocks(page, "python"))
    assert [given for given in GIVEN if not re.search(rf"\b{given}\b", code)] == []
