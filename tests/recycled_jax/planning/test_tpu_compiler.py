"""Finding the compiler. How it is run is in tests/tpu_check/test_jobs.py."""

import json
import subprocess
from pathlib import Path

import pytest

from recycled_jax.planning import tpu_compiler


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """No compiler among the modules, and an environment of our own."""
    monkeypatch.setattr(tpu_compiler, "find_spec", lambda name: None)
    monkeypatch.setattr(tpu_compiler.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(tpu_compiler.sys, "path", [])
    return tmp_path / "libtpu"


def test_without_one_the_sentence_says_how_to_get_it(beside):
    with pytest.raises(ValueError, match=r"not installed; `pip install 'recycled-jax\[tpu-check\]'`"):
        tpu_compiler.compiler_version()


def test_one_beside_the_environment_is_found(beside, tmp_path, monkeypatch):
    info = beside / "libtpu-9.8.7.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 9.8.7\n")
    assert tpu_compiler.compiler_version() == "9.8.7"

    def run(command, *, env, **_):
        Path(command[-1]).write_text(json.dumps({"path": env["PYTHONPATH"]}))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setattr(tpu_compiler.subprocess, "run", run)
    monkeypatch.setattr(tpu_compiler.tempfile, "tempdir", str(tmp_path))
    assert tpu_compiler.alone("module", [], tmp_path / "out.json", 1) == {"path": f"mine:{beside}"}
