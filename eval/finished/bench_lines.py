"""Lines of bench.jsonl."""

from collections.abc import Mapping
from typing import Any

from eval.finished.checked_json import finite, number, numbers, take
from eval.finished.run import Bench, device_name


def bench_record(where: str, values: Mapping[str, Any]) -> Bench:
    """A line's record, which stands at `where`. Raises ValueError as `take`."""
    device = take(values, "device", dict, where)
    policy = take(values, "policy", dict, where)
    take(policy, "name", str, f"{where}, policy")
    dense = values.get("dense") or {}
    moved = [v for v in (values.get("bytes_per_step") or {}).values() if v is not None]
    return Bench(
        kind=take(values, "kind", str, where),
        valid=bool(values.get("valid")),
        status=take(values, "status", str, where),
        device=device_name(device, "chips"),
        policy=policy,
        mode=str(values.get("mode")),
        weights=str(values.get("weights")),
        length=take(values, "length", int, where),
        batch=take(values, "batch", int, where),
        decode=_percentiles(values, where),
        dense_decode=_percentiles(dense, where),
        **{n: number(values, n, where) for n in ("ratio_decode", "ratio_prefill", "floor_ms", "mbu", "ideal_speedup")},
        bytes_per_step=sum(moved) if moved else None,
        effective_stride=numbers(values, "effective_stride", where),
    )


def _percentiles(values: Mapping[str, Any], where: str) -> tuple[float, float, float] | None:
    times = values.get("decode_ms_per_step")
    if times is None:
        return None
    return finite(times, "p10", where), finite(times, "p50", where), finite(times, "p90", where)
