"""A run from its first step, or from its newest checkpoint, to its last; progress, metrics and export on the way."""

import json
import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from optax import GradientTransformation
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import find_checkpoint, load_hf, save_hf
from recycled_jax.model import Llama, causal
from recycled_jax.tasks.prose import generated_sentences, read_haystack
from recycled_jax.tokenizer import load_tokenizer
from recycled_jax.weights import parameter_count
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.data import Batch, RetrievalMixture
from train.evaluate import RetrievalEvaluation
from train.optimizer import make_optimizer
from train.step import (
    Metrics,
    TrainState,
    abstract_state,
    init_state,
    make_mesh,
    make_train_step,
    start_state,
)
from train.tokenizer import BOS, EOS, PAD, train_tokenizer


def train(config: TrainConfig) -> Path | None:
    """Trains, and returns the exported Hugging Face folder `<out>/hf`; None when SIGTERM stopped it before the end.

    Resumes from the newest checkpoint in `out`; SIGTERM saves one and stops. Metrics are appended to
    `<out>/metrics.jsonl`, one JSON object per logged step and one per evaluation.
    """
    out = Path(config.out)
    sentences = [sentence for path in config.data.texts for sentence in read_haystack(path, argument="data.texts")]
    mesh = make_mesh(config.mesh)
    _check_batches(config, mesh)
    with _StopOnSigterm() as stop, closing(Checkpoints(config)) as checkpoints:
        first = done = checkpoints.step or 0
        tokenizer = _tokenizer(out / "tokenizer", sentences, config, resumed=first > 0)
        model = Llama(
            model_config(config, tokenizer),
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            attention=config.model.cca or config.model.recycled or causal,
        )
        # what was trained with recycled attention decodes with any policy
        evaluated = model.clone(attention=config.model.cca or causal)
        evaluation = RetrievalEvaluation(
            evaluated, tokenizer, length=config.evaluate_length, examples=config.evaluate_examples, seed=config.seed + 1
        )
        optimizer = make_optimizer(config.optimizer, model.config, config.steps)
        state = checkpoints.restore(abstract_state(model, optimizer, mesh))
        if state is None:
            state = _first_state(model, optimizer, mesh, config)
        step_fns = {
            parts: make_train_step(model, optimizer, mesh, accumulate=parts, z_loss=config.z_loss)
            for parts in {stage.accumulate for stage in config.stages}
        }
        mixture = RetrievalMixture(config.data, tokenizer, sentences, config.seed)
        tqdm.write(f"{parameter_count(model.config):,} parameters, {config.steps} steps, starting at step {first}")
        with (
            closing(_Log(out / "metrics.jsonl", first)) as log,
            tqdm(total=config.steps, initial=first, unit="step", disable=None) as bar,
        ):
            for step, batch in _batches(mixture, config, first):
                state, metrics = step_fns[config.stage_at(step).accumulate](state, batch)
                bar.update()
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    log.write(done, metrics, batch, bar)
                    _check_skipped(int(metrics.skipped), done, config)
                if done == config.steps or done % config.evaluate_every == 0:
                    log.note(done, evaluation(state.params))
                stopping = stop.asked and done < config.steps
                # last of all: what is logged up to a checkpoint is not computed again by the run that resumes there
                if done == config.steps or stopping or done % config.save_every == 0:
                    checkpoints.save(done, state)
                if stopping:
                    break
    if done < config.steps:
        tqdm.write(f"stopped at step {done} of {config.steps}; the same command goes on from there")
        return None
    save_hf(out / "hf", model, state.params, tokenizer=tokenizer, dtype=jnp.dtype(config.export_dtype))
    return out / "hf"


def _first_state(model: Llama, optimizer: GradientTransformation, mesh: Mesh, config: TrainConfig) -> TrainState:
    if config.model.start is None:
        return init_state(model, optimizer, mesh, config.seed, config.model.init)
    _, params = load_hf(config.model.start, mesh=mesh)
    return start_state(model, optimizer, mesh, params)


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The model of a run; from scratch: tied embeddings, the vocabulary rounded up to a multiple of 128."""
    sizes = config.model
    if sizes.start is not None:
        return LlamaConfig.from_hf(find_checkpoint(sizes.start))
    ids = tokenizer.get_vocab()
    return LlamaConfig(
        model_type=sizes.model_type,
        vocab=-(-len(tokenizer) // 128) * 128,
        embed=sizes.embed,
        mlp=sizes.mlp,
        layers=sizes.layers,
        query_heads=sizes.query_heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope_theta=sizes.rope_theta,
        max_length=sizes.max_length,
        tie_embeddings=True,
        bos_id=ids[BOS],
        eos_ids=(ids[EOS],),
        pad_id=ids[PAD],
    )


def _check_skipped(skipped: int, step: int, config: TrainConfig) -> None:
    if skipped >= config.max_skipped:
        raise FloatingPointError(
            f"step {step}: the loss or the gradient was not finite in the last {skipped} steps (max_skipped="
            f"{config.max_skipped}); out={config.out!r} has the checkpoints from before, lower optimizer.learning_rate "
            "and choose another out to begin again"
        )


def _check_batches(config: TrainConfig, mesh: Mesh) -> None:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for stage in config.stages:
        if stage.batch % (shards * stage.accumulate):
            parts = f" x accumulate={stage.accumulate}" if stage.accumulate > 1 else ""
            raise ValueError(f"stages: batch={stage.batch} must be a multiple of data x fsdp = {shards} devices{parts}")


def _tokenizer(path: Path, sentences: list[str], config: TrainConfig, *, resumed: bool) -> PreTrainedTokenizerFast:
    # without a checkpoint, what lies there may be half written or of other settings
    if not resumed and config.model.start is not None:
        tokenizer = load_tokenizer(config.model.start)
        missing = [token for token in (BOS, EOS, PAD) if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"model.start={config.model.start!r} has a tokenizer without {missing[0]}, as the data need"
            )
        tokenizer.save_pretrained(path)
    elif not resumed:
        prose = generated_sentences(np.random.default_rng(config.seed), 5000)
        train_tokenizer([*sentences, *prose], merges=config.data.tokenizer_merges).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _batches(mixture: RetrievalMixture, config: TrainConfig, first: int) -> Iterator[tuple[int, Batch]]:
    """Batches from step `first` on, the next one always in the making while the device works."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(mixture.batch, first, config.stage_at(first))
        for step in range(first, config.steps):
            batch = ahead.result()
            ahead = pool.submit(mixture.batch, step + 1, config.stage_at(step + 1))
            yield step, batch


class _Log:
    """Appends to `metrics.jsonl`, after dropping what a killed run logged beyond step `first`."""

    def __init__(self, path: Path, first: int):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = path.with_suffix(".partial")
        kept.write_text("".join(line for line in lines if _step_of(line) <= first), encoding="utf-8")
        kept.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._since = time.perf_counter()
        self._step: int | None = None

    def write(self, step: int, metrics: Metrics, batch: Batch, bar: tqdm) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        now = time.perf_counter()
        steps = step - self._step if self._step is not None else None
        if steps:
            values["tokens_per_second"] = steps * batch.tokens.size / (now - self._since)
        self._since, self._step = now, step
        bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        self.note(step, {"length": batch.tokens.shape[1], **values})

    def note(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for one that was cut short."""
    return json.loads(line)["step"] if line.endswith("}\n") else math.inf


class _StopOnSigterm:
    """Within its context, `asked` turns true when the process is told to terminate, so that the loop can save first."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_) -> None:
        self.asked = True
