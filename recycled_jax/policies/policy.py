"""A policy: how tokens are decoded, and how prompts are read, under a name."""

from dataclasses import dataclass

from recycled_jax.frame import Dense, DensePrefill, Method, Observer, PrefillAttention

_DENSE, _DENSE_PREFILL = Dense(), DensePrefill()


@dataclass(frozen=True)
class Policy:
    """A named way to decode. `method` is how layers attend in a decode step; `prefill`, how the prompt does.
    `correct_every`: after so many decode steps the keys and values of their tokens are computed anew with dense
    attention (`correction`); None for never."""

    name: str
    method: Method = _DENSE
    prefill: PrefillAttention = _DENSE_PREFILL
    correct_every: int | None = None

    def __post_init__(self) -> None:
        if self.correct_every is not None and self.correct_every < 1:
            raise ValueError(f"correct_every={self.correct_every} must be at least 1 step")

    @property
    def observers(self) -> tuple[Observer, ...]:
        """What has to be seen of a prompt so that this policy can go on from it."""
        return self.method.observers
