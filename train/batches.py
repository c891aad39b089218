"""What a run is trained on, step by step: the retrieval mixture or a corpus, each able to go on from any step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from train.config import Corpus, Stage, TrainConfig
from train.corpus import Position, Stream
from train.data import Batch, RetrievalMixture
from train.step import batch_sharding

Positions = dict[int, Position]  # of the streams of this host


class Batches(Protocol):
    """`batch` is called once for each step, in order."""

    def batch(self, step: int, stage: Stage) -> Batch: ...

    @property
    def positions(self) -> Positions:
        """Where the streams stand after the batches so far; empty for what follows from the step alone."""
        ...


class Text:
    """Rows of a corpus; those of other hosts are zero."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int, own: list[int], saved: Positions):
        self._count = corpus.streams
        self._streams = {
            index: Stream(corpus, tokenizer, seed=seed, index=index, state=saved.get(index, Position()))
            for index in own
        }

    def batch(self, step: int, stage: Stage) -> Batch:
        tokens = np.zeros((stage.batch, stage.length), np.int32)
        of_stream = stage.batch // self._count
        for index, stream in self._streams.items():
            for row in range(index * of_stream, (index + 1) * of_stream):
                tokens[row] = stream.row(stage.length)
        positions = np.broadcast_to(np.arange(stage.length, dtype=np.int32), tokens.shape)
        return Batch(tokens, positions, np.ones(tokens.shape, np.float32), np.zeros(tokens.shape, bool))

    @property
    def positions(self) -> Positions:
        return {index: stream.position for index, stream in self._streams.items()}


def own_streams(corpus: Corpus, mesh: Mesh, stage: Stage) -> list[int]:
    """The streams whose rows lie on devices of this host; the same for every stage that `check_batches` accepts."""
    of_stream = stage.batch // corpus.streams
    shape = (stage.batch, stage.length)
    slices = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    rows = {row for index in slices if index for row in range(*index[0].indices(stage.batch))}
    return sorted({row // of_stream for row in rows})


def make_batches(
    config: TrainConfig, mesh: Mesh, tokenizer: PreTrainedTokenizerFast, sentences: list[str], saved: Positions
) -> Batches:
    """What `config` trains on; a corpus from where its streams were `saved`."""
    if config.corpus is None:
        return RetrievalMixture(config.data, tokenizer, sentences, config.seed)
    own = own_streams(config.corpus, mesh, config.stages[0])
    return Text(config.corpus, tokenizer, config.seed, own, saved)


def check_batches(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ValueError, naming the setting, for batches that the mesh or the streams of the corpus cannot share."""
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]
    streams = config.corpus.streams if config.corpus else 1
    if shards % streams and streams % shards:
        raise ValueError(f"corpus.streams={streams} must be a multiple of data x fsdp = {shards} devices, or divide it")
    for stage in config.stages:
        if stage.batch % (shards * stage.accumulate):
            by = f" x accumulate={stage.accumulate}" if stage.accumulate > 1 else ""
            raise ValueError(f"stages: batch={stage.batch} must be a multiple of data x fsdp = {shards} devices{by}")
        if stage.batch % streams:
            raise ValueError(f"stages: batch={stage.batch} must be a multiple of corpus.streams={streams}")
        if stage.length % parts:
            raise ValueError(f"stages: length={stage.length} must be a multiple of sequence = {parts} devices")
    if config.evaluation.length % parts:
        raise ValueError(
            f"evaluation.length={config.evaluation.length} must be a multiple of sequence = {parts} devices"
        )


class Made(NamedTuple):
    """The batch of a step, and where the streams stand after it."""

    step: int
    batch: Batch
    positions: Positions


def made_ahead(batches: Batches, config: TrainConfig, first: int) -> Iterator[Made]:
    """The batches from step `first` on, the next one always in the making while the device works."""

    def make(step: int) -> Made:
        return Made(step, batches.batch(step, config.stage_at(step)), dict(batches.positions))

    if first == config.steps:
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(make, first)
        for step in range(first, config.steps):
            made = ahead.result()
            if step + 1 < config.steps:
                ahead = pool.submit(make, step + 1)
            yield made


def to_array(positions: Positions, streams: int) -> np.ndarray:
    """Of all streams, int32 [streams, fields]: every host brings those it has."""
    ours = np.zeros((streams, len(Position._fields)), np.int32)
    for index, position in positions.items():
        ours[index] = position
    if jax.process_count() == 1:
        return ours
    return np.max(multihost_utils.process_allgather(ours), axis=0)


def from_array(array: np.ndarray) -> Positions:
    """What `to_array` was made of."""
    return {index: Position(*map(int, row)) for index, row in enumerate(np.asarray(array))}
