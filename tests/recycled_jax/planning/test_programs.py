"""What is read off a compiled program; one test compiles for real."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from recycled_jax.planning.compiling import compile_programs
from recycled_jax.planning.programs import ProgramMemory, TooLarge, memory, too_large
from recycled_jax.planning.sizes import sizes
from recycled_jax.planning.tpu_compiler import _beside
from tests.recycled_jax.planning.made_up import setting

HERE = find_spec("libtpu") is not None or _beside() is not None


@struct.dataclass
class _State:
    cache: Any
    kept: Any
    lengths: Any


def test_the_compilers_words_are_read():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert too_large("prefill", message) == TooLarge("prefill", int(20.5 * 2**30), int(15.75 * 2**30))
    assert too_large("prefill", "RESOURCE_EXHAUSTED: no") == TooLarge("prefill", 0, 0)


def test_arguments_are_told_apart_and_add_up_to_the_compilers():
    mesh = jax.make_mesh((1,), ("data",))
    place = NamedSharding(mesh, PartitionSpec())

    def array(size):
        return jax.ShapeDtypeStruct((size,), jnp.int8, sharding=place)

    arguments = ({"params": {"a": array(100)}}, _State(array(50), array(20), array(3)))
    found = SimpleNamespace(
        argument_size_in_bytes=180, temp_size_in_bytes=9, output_size_in_bytes=80, alias_size_in_bytes=73
    )
    read = memory("full step", arguments, found, 'op_name="jit(f)/token_scores/pallas_tpu/x"', 1.0)
    assert (read.weights, read.cache, read.selection, read.other) == (100, 50, 20, 10)
    assert (read.temporaries, read.results, read.total) == (9, 7, 180 + 9 + 80 - 73)
    assert read.implementations == ("token_scores/pallas_tpu",)


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="libtpu, the TPU compiler, is not installed; `make tpu-check` gets it")
def test_a_small_model_compiles_for_a_described_slice():
    asked = setting(context=2048)
    programs = compile_programs(asked)
    assert [program.name for program in programs] == [
        "prefill",
        "first selection",
        "full step",
        "recycled step",
        "decode loop",
    ]
    held = sizes(asked)
    for program in programs[2:]:
        assert isinstance(program, ProgramMemory)
        assert program.cache == held.cache  # on its device, and nowhere twice
        assert program.selection >= held.selection
        assert program.weights == held.weights
        assert program.temporaries < held.cache
        assert "decode_attention/pallas_tpu" in program.implementations or program.name == "recycled step"
