"""From a compile in its own process to a row."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from pallas_kernels import empty_cache
from recycled_jax.planning.chips import CHIPS
from recycled_jax.planning.sizes import nbytes
from tests.tpu_check.made_up import FIGURES, program
from tests.tpu_check.test_bundles import FETCHED, NESTED
from tests.tpu_check.test_hlo import MODULE
from tpu_check import compile, jobs
from tpu_check.bundles import parse
from tpu_check.programs import Built, array
from tpu_check.runs import RUNS


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The lock file and the dumps, so that no real check is waited for."""
    monkeypatch.setattr(jobs.tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def child(monkeypatch):
    """Calls of the child process; `answer` writes its result and gives its exit status and standard error."""
    calls = SimpleNamespace(commands=[], environments=[], answer=None)

    def run(command, *, env, timeout, **_):
        calls.commands.append(command)
        calls.environments.append(env)
        status, stderr = calls.answer(Path(command[-2]), Path(command[-1]))
        return subprocess.CompletedProcess(command, status, b"", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_row_comes_back_and_the_dump_goes(child):
    def answer(dump, out):
        (dump / "1-kernel.1-1-final_bundles.txt").write_text(NESTED)
        out.write_text(json.dumps(asdict(FIGURES)))
        return 0, b"noise"

    child.answer = answer
    row = jobs.run(program(), CHIPS["v6e"])
    assert (row.figures, row.error, row.chip.name) == (FIGURES, "", "v6e")
    (command,), (environment,) = child.commands, child.environments
    assert command[1:5] == ["-m", "tpu_check.compile", "v6e", "decode_attention/8B/b1"]
    assert f"--xla_jf_dump_to={command[5]} " in environment["LIBTPU_INIT_ARGS"]
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert not Path(command[5]).exists()


@pytest.mark.parametrize(
    ("status", "stderr", "error"),
    [
        (1, b"Traceback\n  File x\njax.errors.JaxRuntimeError: VMEM is full\nFor more, see a page.\n", "VMEM is full"),
        (-11, b"", "exit status -11: no message"),
        (-6, b"F1121 Check failed: x == y\n", "exit status -6: F1121 Check failed: x == y"),
        (0, b"", "exit status 0: no message"),  # but wrote nothing
    ],
)
def test_a_crash_becomes_a_row(child, status, stderr, error):
    child.answer = lambda dump, out: (status, stderr)
    row = jobs.run(program(), CHIPS["v5e"])
    assert row.figures is None
    assert row.error.endswith(error)
    assert "\n" not in row.error


def test_a_compile_that_does_not_end_becomes_a_row(child):
    def hang(dump, out):
        raise subprocess.TimeoutExpired("command", jobs.TIMEOUT)

    child.answer = hang
    assert jobs.run(program(), CHIPS["v5e"]).error == f"no result after {jobs.TIMEOUT} s"


def test_a_compile_that_hangs_over_its_bundles_is_tried_without(child):
    def answer(dump, out):
        if "llo_text" in child.environments[-1]["LIBTPU_INIT_ARGS"]:
            raise subprocess.TimeoutExpired("command", jobs.DUMP_TIMEOUT)
        out.write_text(json.dumps(asdict(FIGURES)))
        return 0, b""

    child.answer = answer
    assert jobs.run(program(), CHIPS["v5e"]).figures == FIGURES
    assert len(child.commands) == 2


def test_figures_of_a_compiled_program(monkeypatch):
    monkeypatch.setitem(RUNS, "attend", lambda program, chip: (None, None, 10 * program.batch))
    cache = empty_cache("token_major", layers=2, batch=1, kv_heads=8, capacity=1024, head_dim=128, dtype=jnp.bfloat16)
    built = Built(
        lambda cache: cache,
        (cache,),
        floor_bytes=820_000,
        floor_operations=197_000_000,
        donate=(0,),
        cache=cache,
        tokens=5,
    )
    memory = SimpleNamespace(temp_size_in_bytes=7, alias_size_in_bytes=nbytes(cache))
    layer = "bf16[1024,2,8,128]{3,2,1,0} copy(%cache)"
    text = MODULE.replace("  %choice.1", f"  %c.1 = {layer}\n  %choice.1")
    found = compile.figures(
        program(batch=2), CHIPS["v5e"], built, text, memory, {"attend.1": parse("attend.1", NESTED)}, 1.5
    )
    # two layers, each of a kernel whose loop with an unknown count runs 20 times
    bundles = 2 * (2 + 4 * (12 + 31 * (6 + 16 * 8)) + 20 * 6)
    assert (found.bundles, found.hbm_bytes, found.unknown) == (bundles, 2 * 4 * FETCHED, [])
    assert found.parts == {"attend.1": bundles}
    assert found.floor_us == pytest.approx(1.0)
    assert found.hbm_us == pytest.approx(1e6 * found.hbm_bytes / 820e9)
    assert found.bundle_us == pytest.approx(bundles / 1503, rel=1e-3)
    assert (found.cache_bytes, found.donated) == (2 * 2 * 1024 * 8 * 128 * 2, found.aliased)
    assert found.copies == ["copy c.1[1024,2,8,128]"]
    assert found.implementations == ["decode_attention/pallas_tpu"]
    assert (found.vmem, found.temporaries, found.compile_seconds) == (139_264, 7, 1.5)


def test_a_floor_is_of_bytes_or_of_operations():
    chip = CHIPS["v5e"]
    assert chip.microseconds(bytes=820_000_000, operations=1) == pytest.approx(1000)
    assert chip.microseconds(bytes=1, operations=197_000_000_000) == pytest.approx(1000)


@pytest.mark.parametrize(("name", "clock", "bandwidth"), [("v5e", 1.5, 0.82), ("v5p", 1.75, 2.46), ("v6e", 1.75, 1.64)])
def test_chips_have_their_published_clock_and_bandwidth(name, clock, bandwidth):
    assert CHIPS[name].clock / 1e9 == pytest.approx(clock, rel=0.01)
    assert CHIPS[name].bandwidth / 1e12 == pytest.approx(bandwidth)


def test_bytes_of_abstract_arrays():
    assert nbytes({"a": array((2, 3)), "b": [array((4,), jnp.float32)]}) == 2 * 6 + 4 * 4
