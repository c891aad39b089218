"""A run from its first step, or from its newest checkpoint, to its last; progress, metrics and export on the way."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import save_hf
from recycled_jax.model import Llama
from recycled_jax.tasks.prose import generated_sentences, read_haystack
from recycled_jax.weights import parameter_count
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.data import Batch, RetrievalMixture
from train.evaluate import RetrievalEvaluation
from train.step import Metrics, abstract_state, init_state, make_mesh, make_optimizer, make_train_step
from train.tokenizer import train_tokenizer


def train(config: TrainConfig) -> Path:
    """Trains, and returns the exported Hugging Face folder `<out>/hf`.

    Resumes from the newest checkpoint in `out`; SIGTERM saves one and stops. Metrics are appended to
    `<out>/metrics.jsonl`, one JSON object per logged step.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(config)
    sentences = [sentence for path in config.data.texts for sentence in read_haystack(path)]
    tokenizer = _tokenizer(out / "tokenizer", sentences, config)
    model = Llama(model_config(config, tokenizer), dtype=jnp.dtype(config.dtype), remat=config.remat)
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, model.config, config.steps)
    state = checkpoints.restore(abstract_state(model, optimizer, mesh))
    if state is None:
        state = init_state(model, optimizer, mesh, config.seed, config.model.init)
    first = int(state.step)
    step_fn = make_train_step(model, optimizer, mesh)
    mixture = RetrievalMixture(config.data, tokenizer, sentences, config.seed)
    tqdm.write(f"{parameter_count(model.config):,} parameters, {config.steps} steps, starting at step {first}")
    stop = _StopOnSigterm()
    evaluation = RetrievalEvaluation(
        model, tokenizer, length=config.evaluate_length, examples=config.evaluate_examples, seed=config.seed + 1
    )
    log = _Log(out / "metrics.jsonl")
    with tqdm(total=config.steps, initial=first, unit="step", disable=None) as bar:
        for step, batch in _batches(mixture, config, first):
            state, metrics = step_fn(state, batch)
            if (step + 1) % config.log_every == 0:
                log.write(step + 1, metrics, batch, bar)
            bar.update()
            last = step + 1 == config.steps
            if last or stop.asked or (step + 1) % config.save_every == 0:
                checkpoints.save(step + 1, state)
            if last or (step + 1) % config.evaluate_every == 0:
                log.note(step + 1, evaluation(state.params))
            if stop.asked:
                break
    checkpoints.close()
    if not stop.asked:
        save_hf(out / "hf", model, state.params, tokenizer=tokenizer)
    return out / "hf"


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The model of a run; tied embeddings, the vocabulary rounded up to a multiple of 128."""
    sizes = config.model
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
        bos_id=tokenizer.bos_token_id,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )


def _tokenizer(path: Path, sentences: list[str], config: TrainConfig) -> PreTrainedTokenizerFast:
    if not path.exists():
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
    def __init__(self, path: Path):
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


class _StopOnSigterm:
    """`asked` turns true when the process is told to terminate, so that the loop can save first."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True
