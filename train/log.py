"""What a run tells of itself: the progress bar, `metrics.jsonl`, and TensorBoard's files if asked for."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from recycled_jax.config import LlamaConfig
from train.config import TrainConfig
from train.step import Metrics
from train.throughput import utilisation


class Log:
    """Appends to `<out>/metrics.jsonl`, after dropping what a killed run logged beyond step `first`: one JSON object
    for each logged step and each evaluation. Of many hosts only the first one writes."""

    def __init__(self, config: TrainConfig, model: LlamaConfig, first: int):
        self._model, self._writes = model, jax.process_index() == 0
        self._since, self._step = time.perf_counter(), None
        self._bar = tqdm(total=config.steps, initial=first, unit="step", disable=None if self._writes else True)
        path = Path(config.out) / "metrics.jsonl"
        # of a run that begins, there may be scores from before the first step of another one
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if first and path.exists() else []
        lines = [line for line in lines if _step_of(line) <= first]
        # steps whose scores are there; known to all hosts, which have to agree on what to score
        self.scored = {_step_of(line) for line in lines if "loss" not in json.loads(line)}
        if not self._writes:
            return
        self._tensorboard = _tensorboard(Path(config.out) / "tensorboard") if config.tensorboard else None
        kept = path.with_suffix(".partial")
        kept.write_text("".join(lines), encoding="utf-8")
        kept.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def advance(self) -> None:
        """One step further."""
        self._bar.update()

    def write(self, step: int, metrics: Metrics, batch: int, length: int, counts: Mapping[str, float]) -> None:
        """The metrics of `step`, of `batch` rows of `length` tokens, other `counts`, and how fast the steps since the
        last call were (all taken to be of this size)."""
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()} | dict(counts)
        now = time.perf_counter()
        if self._step is not None:
            values["seconds_per_step"] = (now - self._since) / (step - self._step)
            values["tokens_per_second"] = batch * length / values["seconds_per_step"]
            kind, devices = jax.devices()[0].device_kind, jax.device_count()
            used = utilisation(self._model, length, values["tokens_per_second"], kind, devices)
            if used is not None:
                values["model_flop_utilisation"] = used
        self._since, self._step = now, step
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        self.note(step, {"length": length, **values})

    def note(self, step: int, values: Mapping[str, float]) -> None:
        if self._writes:
            told = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            self._file.write(json.dumps({"step": step, **told}) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                self._tensorboard.write_scalars(step, values)

    def restart_clock(self, step: int) -> None:
        """What came since the last call of `write` was not only steps: speed is counted from here, after `step`."""
        self._since, self._step = time.perf_counter(), step

    def close(self) -> None:
        self._bar.close()
        if self._writes:
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from clu import metric_writers  # brings TensorFlow, which most runs do without
    except ImportError as error:
        raise ValueError("tensorboard=true needs more packages: pip install 'recycled-jax[train]'") from error
    return metric_writers.SummaryWriter(str(folder))


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for one that was cut short."""
    return json.loads(line)["step"] if line.endswith("}\n") else math.inf
