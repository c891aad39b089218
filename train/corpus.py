"""Text to train on: documents from files, drawn through seqio, as rows of tokens.

The only module that needs the extra `train`; it is imported when a run has a corpus, and raises ValueError where seqio
or TensorFlow is missing.
"""

import functools
import glob
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from train.config import Corpus, Source

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or TensorFlow reports that it has found no GPU
try:
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ValueError(f"corpus needs {error.name}, which is not installed: pip install 'recycled-jax[train]'") from error

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)  # they are JAX's

# Documents of a source among which the next one is drawn. All are in memory, for every stream, and some are books.
SHUFFLE_BUFFER = 256
# Documents in a row that may be too short for `truncate` before the run ends.
MAX_SHORT = 10_000


class Position(NamedTuple):
    """How far a stream has come: `documents` are used up, `bad` of which could not be, and so are `tokens` of the next
    one."""

    documents: int = 0
    tokens: int = 0
    bad: int = 0


class Stream:
    """Rows of tokens from the share of `corpus` that belongs to stream `index`, without end.

    The rows depend on the arguments only. A source with at least `corpus.streams` files is shared out by files, another
    by documents, for which every stream reads all of it. A source that is used up begins anew, in another order if
    `corpus.shuffle`; a bad record is then met, and counted, again.

    Packed by `concatenate`, a document is what the tokenizer makes of it, with BOS where it adds one, and EOS; by
    `truncate` nothing is added.

    With the `state` that was `position` after a row, the rows after that one follow. To get there, all documents before
    are read again, though neither parsed nor tokenized.

    Raises ValueError if there are no such files, or no document of a source for this stream.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        index: int,
        state: Position | None = None,
    ):
        if not 0 <= index < corpus.streams:
            raise ValueError(f"index={index} must be at least 0 and below corpus.streams={corpus.streams}")
        if corpus.packing == "concatenate" and tokenizer.eos_token_id is None:
            raise ValueError("corpus.packing='concatenate' needs a tokenizer with an EOS token, to end documents with")
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._index = index
        self._position = state or Position()
        self._ids: np.ndarray | None = None  # of the document that `position.tokens` counts in
        self._sources = [_Documents(source, number, corpus.shuffle) for number, source in enumerate(corpus.sources)]
        shard = seqio.ShardInfo(index, corpus.streams)
        for source in self._sources:
            source.check_share(shard)
        mixture = seqio.Mixture(
            "corpus",
            [(source.task, source.rate) for source in self._sources],
            # with one seed for all, streams would turn to the same source at the same time
            sample_fn=functools.partial(_sample, seed=seed + index),
        )
        # with one seed for all, those that share out documents agree on their order
        records = mixture.get_dataset(split=_SPLIT, shuffle=corpus.shuffle, seed=seed, shard_info=shard)
        self._records = records.skip(self._position.documents).as_numpy_iterator()

    @property
    def position(self) -> Position:
        """Where the last row ended."""
        return self._position

    def row(self, length: int) -> np.ndarray:
        """The next `length` tokens, int32 [length].

        Raises ValueError after too many bad records, or when no document is long enough for `truncate`.
        """
        return self._truncated(length) if self._corpus.packing == "truncate" else self._concatenated(length)

    def _truncated(self, length: int) -> np.ndarray:
        for _ in range(MAX_SHORT):
            ids = self._encode(self._text())
            self._position = self._position._replace(documents=self._position.documents + 1)
            if len(ids) >= length:
                return ids[:length]
        raise ValueError(
            f"corpus.packing='truncate': {MAX_SHORT} documents one after the other have fewer than {length} tokens; "
            "take longer ones, shorter stages or packing='concatenate'"
        )

    def _concatenated(self, length: int) -> np.ndarray:
        pieces = []
        while length:
            if self._ids is None:
                self._ids = np.append(self._encode(self._text()), np.int32(self._tokenizer.eos_token_id))
            documents, used, bad = self._position
            piece = self._ids[used : used + length]
            if not len(piece):
                raise ValueError(f"{self._position} is beyond its document's end; it is of another corpus or tokenizer")
            pieces.append(piece)
            length -= len(piece)
            used += len(piece)
            if used == len(self._ids):
                documents, used, self._ids = documents + 1, 0, None
            self._position = Position(documents, used, bad)
        return np.concatenate(pieces)

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer(text, verbose=False)["input_ids"], np.int32)

    def _text(self) -> str:
        """The next document that can be read; those before it are counted as bad."""
        while True:
            record = next(self._records)
            try:
                return self._sources[record["source"]].parse(record)
            except (ValueError, RecursionError) as error:
                self._leave_out(record["origin"].decode(errors="replace"), error)

    def _leave_out(self, origin: str, reason: Exception) -> None:
        documents, tokens, bad = self._position
        self._position = Position(documents + 1, tokens, bad + 1)
        if bad == self._corpus.max_corrupt:
            raise ValueError(
                f"corpus.max_corrupt={bad}: stream {self._index} has met more bad records than that, the last is "
                f"{origin}: {reason}"
            )
        warnings.warn(f"left out {origin}: {reason}", stacklevel=2)


_SPLIT = "train"  # the one that seqio is asked for; which split of a TFDS dataset that is, its path says
_TFDS = re.compile(r"tfds:(?P<name>[^:]+(:[\d*][\d.*]*)?)(:(?P<split>.+))?")


class _Documents(seqio.DataSource):
    """The records of one source, shuffled within each epoch. seqio alone shuffles after it repeats, so that a document
    of a small source would come twice before another has come at all."""

    def __init__(self, source: Source, number: int, shuffle: bool):
        self._source = source
        self._number = number
        self._files, self._parse = _open(source, shuffle)
        super().__init__([_SPLIT], caching_permitted=False, performs_internal_shuffling=True)
        self.rate = source.rate
        self.task = seqio.Task(f"source_{number}", self, _FEATURES, shuffle_buffer_size=None)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return self._files.list_shards(split)

    def get_dataset(self, split=_SPLIT, shuffle=True, seed=None, shard_info=None, **_):
        records = self._files.get_dataset(split, shuffle, seed, shard_info)
        if isinstance(self._files, seqio.TfdsDataSource):
            records = records.map(lambda example: _record(example["tfds_id"], example[self._source.field]))
        records = records.map(lambda record: {"source": self._number, **record})
        return records.shuffle(SHUFFLE_BUFFER, seed) if shuffle else records

    def parse(self, record: Mapping[str, Any]) -> str:
        """The text of a record. Raises ValueError saying what is wrong with it."""
        if not record["intact"]:
            raise ValueError("it is corrupt, and the rest of the file is lost with it")
        text = self._parse(record["raw"], self._source.field)
        if not text.strip():
            raise ValueError("it has no text")
        text.encode()  # JSON can spell half a character, which no tokenizer takes
        return text

    def check_share(self, shard: seqio.ShardInfo) -> None:
        """Raises ValueError if the source has no document for a stream."""
        share = self.task.get_dataset(split=_SPLIT, shuffle=False, shard_info=shard)
        if not any(True for _ in share.take(1)):
            count = sum(1 for _ in self.get_dataset(shuffle=False))
            raise ValueError(
                f"corpus.sources: {self._source.path!r} has {count} documents in {len(self.list_shards(_SPLIT))} files, "
                f"none of them for stream {shard.index} of corpus.streams={shard.num_shards}"
            )


def _sample(datasets: Sequence[tf.data.Dataset], rates: Sequence[float], _, seed: int) -> tf.data.Dataset:
    return tf.data.Dataset.sample_from_datasets(datasets, rates, seed=seed, stop_on_empty_dataset=True)


def _open(source: Source, shuffle: bool) -> tuple[seqio.DataSource, "Parser"]:
    """Where the documents are, and what makes a text of one."""
    if tfds_path := _TFDS.fullmatch(source.path):
        return _open_tfds(source, tfds_path["name"], tfds_path["split"] or "train"), _plain_text
    files = sorted(tf.io.gfile.glob(source.path))
    if not files:
        raise ValueError(f"corpus.sources: path={source.path!r} matches no file")
    kinds = {_kind_of(file): file for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(
            f"corpus.sources: path={source.path!r} must match files of one kind, {', '.join(_KINDS)}, but has "
            f"{' and '.join(sorted(kinds.values()))}"
        )
    read, parse = _KINDS[_kind_of(files[0])]
    files = [glob.escape(file) for file in files]  # seqio expands the names once more
    # files in turn, or one after the other
    return seqio.FileDataSource(read, {_SPLIT: files}, cycle_length=16 if shuffle else 1), parse
