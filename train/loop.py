"""A run from its first step, or from its newest checkpoint, to its last; checkpoints, scores and export on the way."""

import signal
from contextlib import closing
from pathlib import Path
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import save_hf
from recycled_jax.mesh import make_mesh
from recycled_jax.model import Llama, causal
from recycled_jax.tasks.prose import read_haystack
from recycled_jax.tokenizer import load_tokenizer
from recycled_jax.weights import parameter_count
from train.batches import check_batches, made_ahead, make_batches
from train.checkpoint import Checkpoints, Saved
from train.config import TrainConfig
from train.evaluate import evaluations
from train.log import Log
from train.optimizer import averaged, make_optimizer
from train.start import first_state, write_model_config, write_tokenizer
from train.step import Metrics, TrainState, abstract_state, make_train_step, spread


def train(config: TrainConfig) -> Path | None:
    """Trains, and returns the exported Hugging Face folder `<out>/hf`; None when SIGTERM stopped it before the end.

    Resumes from the newest checkpoint in `out`; SIGTERM saves one and stops. Of many hosts, all call this, and `out` is
    a folder they share.
    """
    if config.distributed is not None:
        config.distributed.join()
    out = Path(config.out)
    sentences = [sentence for path in config.data.texts for sentence in read_haystack(path, argument="data.texts")]
    mesh = make_mesh(config.mesh)
    check_batches(config, mesh)
    with _StopOnSigterm() as stop, Checkpoints(config) as checkpoints:
        first = done = checkpoints.step or 0
        if first == 0 and jax.process_index() == 0:  # what lies there may be half written or of other settings
            write_tokenizer(out / "tokenizer", sentences, config)
            write_model_config(out / "model", config, load_tokenizer(out / "tokenizer"))
        _wait_for_others("tokenizer")
        tokenizer = cast(PreTrainedTokenizerFast, load_tokenizer(out / "tokenizer"))
        model = Llama(
            LlamaConfig.from_hf(out / "model"),
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            attention=config.model.cca or config.model.recycled or causal,
        )
        # what was trained with recycled attention decodes with any policy
        evaluated = model.clone(attention=config.model.cca or causal)
        asked, recycled = config.evaluation, config.model.recycled
        scores = evaluations(evaluated, tokenizer, mesh, asked, seed=config.seed + 1, recycled=recycled)
        optimizer = make_optimizer(config.optimizer, model.config, config.steps, ema=config.ema)
        saved = checkpoints.restore(abstract_state(model, optimizer, mesh))
        if saved is None:
            saved = Saved(first_state(model, optimizer, mesh, config), {})
        state = saved.state
        step_fns = {
            parts: make_train_step(model, optimizer, mesh, accumulate=parts, z_loss=config.z_loss)
            for parts in {stage.accumulate for stage in config.stages}
        }
        batches = make_batches(config, mesh, tokenizer, sentences, saved.positions)
        tqdm.write(f"{parameter_count(model.config):,} parameters, {config.steps} steps, starting at step {first}")
        with closing(Log(config, model.config, first)) as log, closing(_Profile(config)) as profile:

            def evaluate(step: int) -> None:
                log.note(step, {name: value for score in scores for name, value in score(averaged(state)).items()})
                log.restart_clock(step)

            due = first % config.evaluation.every == 0 if first else config.model.start is not None
            if scores and due and first not in log.scored:  # before training, or what a stop left no time for
                evaluate(first)
            before: tuple[int, Metrics] | None = None
            for step, batch, positions in made_ahead(batches, config, first):
                profile.before(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = step_fns[config.stage_at(step).accumulate](state, spread(batch, mesh))
                if before is not None:  # its figures are there by now: looking at them holds nothing up
                    _check_skipped(*before, config)
                log.advance()
                done, last = step + 1, step + 1 == config.steps
                before = done, metrics
                if done % config.log_every == 0 or last:
                    bad = {"bad_records": sum(position.bad for position in positions.values())} if positions else {}
                    log.write(done, metrics, *batch.tokens.shape, counts=bad)
                stopping = stop.asked_anywhere() and not last
                saving = last or stopping or done % config.save_every == 0
                if saving:
                    _check_skipped(done, metrics, config)
                if stopping:  # at once, there may not be time for more
                    checkpoints.save(done, state, positions)
                    break
                if scores and (last or done % config.evaluation.every == 0):
                    evaluate(done)
                if saving:  # after the scores: what is logged up to a checkpoint is not computed again from there
                    checkpoints.save(done, state, positions)
    if done < config.steps:
        tqdm.write(f"stopped at step {done} of {config.steps}; the same command goes on from there")
        return None
    _export(out / "hf", model, averaged(state), tokenizer, config)
    return out / "hf"


def _export(path: Path, model: Llama, params: Any, tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> None:
    dtype = jnp.dtype(config.export_dtype)
    if jax.process_count() > 1:  # one weight of all layers at a time is whole on every device
        params = jax.tree.map(lambda x: multihost_utils.process_allgather(x.astype(dtype), tiled=True), params)
    if jax.process_index() == 0:
        save_hf(path, model, params, tokenizer=tokenizer, dtype=dtype)
    _wait_for_others("export")


def _wait_for_others(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _check_skipped(step: int, metrics: Metrics, config: TrainConfig) -> None:
    skipped = int(metrics.skipped)
    if skipped >= config.max_skipped:
        raise FloatingPointError(
            f"step {step}: the loss or the gradient was not finite in the last {skipped} steps (max_skipped="
            f"{config.max_skipped}); out={config.out!r} has the checkpoints from before, lower optimizer.learning_rate "
            "and choose another out to begin again"
        )


class _Profile:
    """Of the steps that `config.profile` tells, written to `<out>/profile`."""

    def __init__(self, config: TrainConfig) -> None:
        self._first, self._end = config.profile or (-1, -1)
        self._folder, self._running = str(Path(config.out) / "profile"), False

    def before(self, step: int, state: TrainState) -> None:
        """To be called before each step, with the state it begins from."""
        if step == self._end:
            jax.block_until_ready(state)
            self.close()
        elif step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class _StopOnSigterm:
    """Within its context, remembers that a process was told to terminate, so that the loop can save first."""

    def __init__(self) -> None:
        self.asked = False
        self._told: jax.Array | None = None
        every = Mesh(np.asarray(jax.devices()), ("device",))
        self._of_devices = NamedSharding(every, PartitionSpec("device"))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(every, PartitionSpec()))

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_) -> None:
        self.asked = True

    def asked_anywhere(self) -> bool:
        """Of any host. All hosts have to ask, and get the same answer: that of one call before, so that none waits for
        the step under way."""
        if jax.process_count() == 1:
            return self.asked
        told = jax.make_array_from_callback((jax.device_count(),), self._of_devices, lambda _: np.array([self.asked]))
        before, self._told = self._told, self._any(told)
        return before is not None and bool(before)
