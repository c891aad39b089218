"""Choosing an implementation of an operation."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache import HeadMajor, KVCache, Layout, PerLayer
from pallas_kernels.divided import Divided
from pallas_kernels.mesh import devices, on_rows_and_heads, parts

# Names tried in this order when the caller names none; a name that an operation's table lacks is skipped.
AUTOMATIC = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("pallas_tpu", "xla")}

# Of a layer; a smaller one stays in the processor's cache, where a copy costs less than compiling unrolled layers.
APART_BYTES = 1 << 20

_INTERPRETED = contextvars.ContextVar("pallas_kernels interpreted", default=False)


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Programs traced inside run TPU kernels in JAX's interpreter, on any machine: for tests, and very slow.

    `params` choose what the interpreter checks (races, reads out of bounds) and when its DMAs run.
    """
    token = _INTERPRETED.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams() if params is None else params):
            yield
    finally:
        _INTERPRETED.reset(token)


def platform() -> str:
    """What the program under way is for: "cpu", "gpu" or "tpu"; that of the abstract mesh in use, if one is.

    Compiling for a described TPU on another machine takes such a mesh (`jax.sharding.use_abstract_mesh`).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.device_kind.startswith("TPU"):
        return "tpu"
    return jax.default_backend()


def kernels_by_default() -> bool:
    """Whether TPU kernels run when nobody names an implementation.

    Not where slots are divided over the mesh in use; and without a mesh on one TPU only, for the compiler cannot
    partition a kernel over devices by itself, as it does with the rest of a program.
    """
    alone = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
    return platform() == "tpu" and parts() == 1 and alone


def preferred_layout(implementation: str | None) -> Layout:
    """The layout of the cache that `implementation` reads fastest: the TPU kernels take none but their own."""
    on_kernels = implementation == "pallas_tpu" or (implementation is None and kernels_by_default())
    return "token_major" if on_kernels else "head_major"


def for_decoding(cache: KVCache) -> KVCache:
    """`cache` as decode steps read it fastest: where they would copy layers of a stack, these are copied apart once."""
    return PerLayer.of(cache) if isinstance(cache, HeadMajor) and layers_are_copied(cache) else cache


def layers_are_copied(cache: KVCache) -> bool:
    """Whether XLA's products copy a layer of `cache` before they read it, and the layer is large enough to care."""
    large = (cache.k.nbytes + cache.v.nbytes) // cache.layers >= APART_BYTES if isinstance(cache, HeadMajor) else False
    return alone_on_cpu() and large


def alone_on_cpu() -> bool:
    """Whether the program is for a CPU, and for no mesh of them."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().empty


def run(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call one of `implementations` with the arguments, and return what it returns.

    An implementation asked for by name runs or raises, it never falls back. With `None` the names listed for the
    `platform()` are tried in order, where `NotImplementedError` means "not for me". What ran can be read in the
    compiled program: its instructions are in the scope `operation/name`.

    Raises:
        ValueError: `implementation` is not a name in the table.
        NotImplementedError: the named implementation declines or cannot run here, or every automatic choice does (all
            reasons are given).
    """
    if any(isinstance(argument, Divided) for argument in args):
        if "divided" not in implementations or implementation not in (None, "xla"):
            raise NotImplementedError(f"{implementation=} of {operation} takes no cache divided over a mesh")
        implementation = "divided"
    elif platform() == "tpu" and devices() > 1:
        on_device = functools.partial(_run_here, operation, implementations, implementation)
        return on_rows_and_heads(on_device, args, kwargs, all_heads=kwargs.get("shared") is not None)
    return _run_here(operation, implementations, implementation, *args, **kwargs)


def _run_here(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`run` with what this device has of the arguments."""
    if implementation is not None:
        if implementation not in implementations:
            valid = ", ".join(sorted(implementations))
            raise ValueError(
                f"{implementation=} is not an implementation of {operation}; expected None or one of: {valid}"
            )
        if implementation == "pallas_tpu" and platform() != "tpu" and not _INTERPRETED.get():
            raise NotImplementedError(
                f"{implementation=} of {operation} needs a TPU and this program is for {platform()}; expected None, "
                "or `pallas_kernels.interpreted()` around the program to run it in the interpreter"
            )
        with jax.named_scope(f"{operation}/{implementation}"):
            return implementations[implementation](*args, **kwargs)

    reasons = []
    for name in AUTOMATIC[platform()]:
        if name not in implementations or (name == "pallas_tpu" and not kernels_by_default()):
            continue
        try:
            with jax.named_scope(f"{operation}/{name}"):
                return implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no implementation of {operation} takes these arguments; " + "; ".join(reasons))
