"""Choosing an implementation of an operation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

# Names tried in this order when the caller names none; a name that an operation's table lacks is skipped.
AUTOMATIC = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}


def run(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call one of `implementations` with the arguments, and return what it returns.

    An implementation asked for by name runs or raises, it never falls back. With `None` the names listed for
    the default JAX platform are tried in order, where `NotImplementedError` means "not for me". What ran can
    be read in the compiled program: its instructions are in the scope `operation/name`.

    Raises:
        ValueError: `implementation` is not a name in the table.
        NotImplementedError: the named implementation declines, or every automatic choice does (all reasons
            are given).
    """
    if implementation is not None:
        if implementation not in implementations:
            valid = ", ".join(sorted(implementations))
            raise ValueError(
                f"{implementation=} is not an implementation of {operation}; expected None or one of: {valid}"
            )
        with jax.named_scope(f"{operation}/{implementation}"):
            return implementations[implementation](*args, **kwargs)

    reasons = []
    for name in AUTOMATIC[jax.default_backend()]:
        if name not in implementations:
            continue
        try:
            with jax.named_scope(f"{operation}/{name}"):
                return implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no implementation of {operation} takes these arguments; " + "; ".join(reasons))
