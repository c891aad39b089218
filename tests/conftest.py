"""What every test runs under: CPU only, several devices, no network, and annotations that are checked."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time of these tests is compilation, of small programs that run once or twice: they are not optimised, as
# those of users are, and not split into parts.
_FAST = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{_FAST} {os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

# jax reads the variables above when it is imported, and the hook rewrites only modules imported after it.
import gc
import itertools
from collections.abc import Callable, Iterator

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook(["recycled_jax", "pallas_kernels"], "beartype.beartype")

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function whose every call gives another PRNG key: the same sequence of keys in every test and run."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs() -> Iterator[None]:
    """Each program compiled for a CPU holds some mappings of memory, of which a process has 65,530 (Linux): those of a
    module go with it, or the compiler crashes somewhere in the thousands."""
    yield
    jax.clear_caches()
    gc.collect()
