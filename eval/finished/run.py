"""What the folder of a finished run holds, in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Numbers = tuple[float | None, ...]


@dataclass(frozen=True)
class Config:
    """What a prediction depends on. `values` is all of config.json."""

    hash: str
    model: Mapping[str, Any]
    policy: Mapping[str, Any]
    mode: str
    question: str
    values: Mapping[str, Any]

    @property
    def k(self) -> int | None:
        """The policy's budget, which may be its selector's."""
        return next((v for name, v in flat(self.policy).items() if name == "k" or name.endswith(".k")), None)

    @property
    def dense(self) -> bool:
        return self.policy["name"] == "full"


@dataclass(frozen=True)
class Prediction:
    """One example's answer. `score` (0 to 100) is 0 where the example failed, and None in a perplexity cell; `nll` has
    the nats of each scored token there."""

    line: int
    pred: str
    outputs: tuple[str, ...]
    score: float | None
    nll: tuple[float, ...] | None
    gen_tokens: int | None
    meta: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True)
class Layer:
    """Of one example: `overlap` by refresh, `coverage_by_age` by steps since the refresh, from 0."""

    layer: int
    overlap: Numbers
    coverage_by_age: Numbers


@dataclass(frozen=True)
class CellMetrics:
    """Means over a cell; None where not measured. Times in ms of a batch, bytes of one row."""

    failed: int
    underfilled: int
    empty: int
    interval: tuple[float, float] | None
    limit_share: float | None
    policy_steps: float | None
    effective_stride: Numbers
    overlap: Numbers
    coverage: Numbers
    kv_bytes_per_step: float | None
    dense_kv_bytes_per_step: float | None
    weight_bytes: float | None
    prefill_ms: float | None
    decode_ms_per_step: float | None
    batch: int | None


@dataclass(frozen=True)
class Cell:
    """A task at a length. `hash` is None where the file does not tell it; predictions go by line."""

    task: str
    length: int
    hash: str | None
    predictions: Mapping[int, Prediction]
    telemetry: Mapping[int, tuple[Layer, ...]]
    metrics: CellMetrics | None
    error: str | None

    @property
    def of_perplexity(self) -> bool:
        return any(one.nll is not None for one in self.predictions.values())

    @property
    def effective_stride(self) -> Numbers:
        """Decode steps per refresh of each layer, None where it never refreshed; empty if not measured."""
        return self.metrics.effective_stride if self.metrics else ()


@dataclass(frozen=True)
class Bench:
    """A line of bench.jsonl; times are 10th, 50th and 90th percentile in ms."""

    kind: str
    valid: bool
    status: str
    device: str
    policy: Mapping[str, Any]
    mode: str
    weights: str
    length: int
    batch: int
    decode: tuple[float, float, float] | None
    dense_decode: tuple[float, float, float] | None
    ratio_decode: float | None
    ratio_prefill: float | None
    floor_ms: float | None
    mbu: float | None
    ideal_speedup: float | None
    bytes_per_step: float | None
    effective_stride: Numbers


@dataclass(frozen=True)
class Run:
    """`cells` go by task and length."""

    path: Path
    config: Config
    invocations: tuple[Mapping[str, Any], ...]
    cells: Mapping[tuple[str, int], Cell]
    bench: tuple[Bench, ...]

    @property
    def device(self) -> str:
        """Of all invocations; more than one if they differ."""
        found = [device_name(one["device"], "count") for one in self.invocations if one.get("device")]
        return " and ".join(dict.fromkeys(found)) or "unknown device"


def device_name(device: Mapping[str, Any], count: str) -> str:
    """Kind and number, which the field `count` tells."""
    return f"{device.get('kind', 'unknown')} × {device.get(count, '?')}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result
