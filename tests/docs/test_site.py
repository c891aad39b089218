"""The site builds without a warning, fetches nothing, and its reference leaves no public name undocumented."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))
MODULES = [module for page in REFERENCE for module in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
# What a page fetches when it is opened; links that are followed by a click are not.
_FETCHED = re.compile(
    r"""<(script|img|iframe|source)\b[^>]*\ssrc="?(https?:)?//"""
    r"""|<link\b[^>]*rel="?(stylesheet|preconnect|icon)\b[^>]*href="?(https?:)?//"""
    r"""|@import url\("?https?:"""
)


def test_builds_without_a_warning_and_fetches_nothing(tmp_path):
    done = subprocess.run(  # with --quiet, mkdocs would not count warnings
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(REFERENCE)
    assert [str(page) for page in pages if _FETCHED.search(page.read_text(encoding="utf-8"))] == []


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def undocumented(tree: ast.Module, names: set[str] | None = None) -> Iterator[str]:
    """Public functions and classes of a module without a docstring; of `names` only, where given."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            public = node.name in names if names is not None else not node.name.startswith("_")
            overload = any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)
            if public and not overload and not ast.get_docstring(node):
                yield node.name


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert list(undocumented(tree)) == []
    # a package's names are defined in the modules that it imports them from
    for node in tree.body if source(module).name == "__init__.py" else []:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            inner = ast.parse(source(node.module).read_text(encoding="utf-8"))
            assert list(undocumented(inner, names)) == []


def test_what_a_page_fetches_is_noticed():
    for html in ('<script defer src="https://x.org/a.js">', '<link rel="stylesheet" href="//x.org/a.css">'):
        assert _FETCHED.search(html)
    assert not _FETCHED.search('<a href="https://x.org"><script src="assets/a.js"></script>')


def test_a_function_without_a_docstring_is_noticed():
    tree = ast.parse('def said():\n    """So."""\n\ndef unsaid(): ...\n\ndef _inner(): ...\n')
    assert list(undocumented(tree)) == ["unsaid"]


def test_all_of_the_kernels_and_the_frame_are_exported():
    for package in ("pallas_kernels", "recycled_jax.frame", "recycled_jax.policies"):
        tree = ast.parse(source(package).read_text(encoding="utf-8"))
        imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        [exported] = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
        assert set(exported) == imported
