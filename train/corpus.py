"""Text to train on: documents from files, drawn through seqio, as rows of tokens.

Nothing else in the repository needs seqio and TensorFlow, and here only a `Stream` does: they are in the extra `train`.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from google.protobuf.message import DecodeError
from transformers import PreTrainedTokenizerFast

from train.config import Corpus, Source

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

# Documents of a source among which the next one is drawn. All are in memory, for every stream, and some are books.
SHUFFLE_BUFFER = 256
# Documents in a row that may be too short for `truncate` before the run ends.
MAX_SHORT = 10_000


class Position(NamedTuple):
    """How far a stream has come: `documents` are used up, or were `bad`, and of the next one so many `tokens`."""

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

    With the `state` that was `position` after a row, or with its numbers, the rows after that one follow. To get there,
    all documents before are read again, though neither parsed nor tokenized.

    Raises ValueError if there are no such files, no document of a source for this stream, or no seqio.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, seed: int, index: int, state: Iterable[int] = ()
    ):
        if not 0 <= index < corpus.streams:
            raise ValueError(f"index={index} must be at least 0 and below streams={corpus.streams}")
        if corpus.packing == "concatenate" and tokenizer.eos_token_id is None:
            raise ValueError("corpus.packing='concatenate' needs a tokenizer with an EOS token, to end documents with")
        _import_libraries()
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._index = index
        self._position = Position(*map(int, state))
        self._ids: np.ndarray | None = None  # of the document that `position.tokens` counts in
        self._sources = [_Documents(source, number, corpus.shuffle) for number, source in enumerate(corpus.sources)]
        shard = seqio.ShardInfo(index, corpus.streams)
        for source in self._sources:
            source.check_share(shard)
        mixture = seqio.Mixture(
            "corpus",
            [(source.task, source.rate) for source in self._sources],
            # another seed for each stream, or all turn to the same source at the same time
            sample_fn=lambda datasets, rates, _: tf.data.Dataset.sample_from_datasets(datasets, rates, seed + index),
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
        raise ValueError(f"corpus.packing='truncate' needs {length} tokens: {MAX_SHORT} documents in a row have fewer")

    def _concatenated(self, length: int) -> np.ndarray:
        pieces = []
        while length:
            if self._ids is None:
                self._ids = self._encode(self._text(), eos=True)
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

    def _encode(self, text: str, *, eos: bool = False) -> np.ndarray:
        ids = self._tokenizer(text, verbose=False)["input_ids"]  # verbose: warns of texts longer than the model's limit
        end = [self._tokenizer.eos_token_id] if eos else []
        return np.asarray(ids if ids[-1:] == end else ids + end, np.int32)

    def _text(self) -> str:
        """The next document that can be read; those before it are counted as bad."""
        while True:
            record = next(self._records)
            try:
                return self._sources[record["source"]].text(record)
            except (ValueError, RecursionError, DecodeError) as error:
                self._leave_out(record["origin"].decode(errors="replace"), error)

    def _leave_out(self, origin: str, reason: Exception) -> None:
        documents, tokens, bad = self._position
        self._position = Position(documents + 1, tokens, bad + 1)
        if bad == self._corpus.max_corrupt:
            raise ValueError(f"corpus.max_corrupt={bad} bad records are exceeded by {origin}: {reason}")
        warnings.warn(f"left out {origin}: {reason}", stacklevel=2)


_SPLIT = "train"  # the one that seqio is asked for; which split of a TFDS dataset that is, its path says
_TFDS = re.compile(r"tfds:(?P<name>[^:]+(:[\d*][\d.*]*)?)(:(?P<split>.+))?")


def _import_libraries() -> None:
    global seqio, tf, tfds
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or TensorFlow reports that it has found no GPU
    try:
        import seqio
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"corpus needs {error.name}, which is missing: pip install 'recycled-jax[train]'") from error
    tf.config.set_visible_devices([], "GPU")  # they are JAX's
    tf.config.set_visible_devices([], "TPU")


class _Documents:
    """The records of one source, as a data source of seqio's, shuffled within each epoch. seqio alone shuffles after it
    repeats, so that a document of a small source would come twice before another has come at all.

    A record has the number of its source, where it is from, its bytes, and whether they could be read at all.
    """

    splits = (_SPLIT,)
    supports_arbitrary_sharding = False
    performs_internal_shuffling = True

    def __init__(self, source: Source, number: int, shuffle: bool):
        self._source = source
        self._number = number
        self._files, self._parse = _open(source, shuffle)
        self.rate = source.rate
        dtypes = {"source": tf.int32, "origin": tf.string, "raw": tf.string, "intact": tf.bool}
        raw = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, rank=0)
        features = {name: dataclasses.replace(raw, dtype=dtype) for name, dtype in dtypes.items()}
        self.task = seqio.Task(f"source_{number}", cast(Any, self), features, shuffle_buffer_size=None)

    def num_input_examples(self, split: str) -> None:
        """Not known."""

    def list_shards(self, split: str) -> Sequence[str]:
        return self._files.list_shards(split)

    def get_dataset(self, split=_SPLIT, shuffle=True, seed=None, shard_info=None) -> tf.data.Dataset:
        records = self._files.get_dataset(split, shuffle, seed, shard_info)
        if isinstance(self._files, seqio.TfdsDataSource):
            records = records.map(lambda example: _record(example["tfds_id"], example[self._source.field]))
        records = records.map(lambda record: {"source": self._number, **record})
        return records.shuffle(SHUFFLE_BUFFER, seed) if shuffle else records

    def text(self, record: Mapping[str, Any]) -> str:
        """The text of a record. Raises ValueError saying what is wrong with it."""
        if not record["intact"]:
            raise ValueError("it is corrupt, and the rest of the file is lost with it")
        text = self._parse(record["raw"], self._source.field)
        if not isinstance(text, str):
            raise ValueError(f"it has no text in the field {self._source.field!r}")
        if not text.strip():
            raise ValueError("its text is empty")
        text.encode()  # JSON can spell half a character, which no tokenizer takes
        return text

    def check_share(self, shard: seqio.ShardInfo) -> None:
        """Raises ValueError if there is no document for a stream."""
        share = self.task.get_dataset(split=_SPLIT, shuffle=False, shard_info=shard)
        if not any(True for _ in share.take(1)):
            count = sum(1 for _ in self.get_dataset(shuffle=False))
            raise ValueError(
                f"corpus.sources: path={self._source.path!r} has {count} documents in {len(self.list_shards(_SPLIT))} "
                f"files, none of them for stream {shard.index} of corpus.streams={shard.num_shards}"
            )


def _open(source: Source, shuffle: bool) -> tuple[seqio.DataSource, Callable[[bytes, str], str | None]]:
    """Where the records of a source come from, and what makes a text of the bytes of one, given the field."""
    if tfds_path := _TFDS.fullmatch(source.path):
        return _open_tfds(source, tfds_path["name"], tfds_path["split"] or "train"), _plain
    files = sorted(tf.io.gfile.glob(source.path))
    kinds = {_kind(file): file for file in files}
    if len(kinds) != 1 or "" in kinds:
        raise ValueError(
            f"corpus.sources: path={source.path!r} must match files of one kind, {', '.join(_READ)}; "
            f"it matches {', '.join(sorted(kinds.values())) or 'no file'}"
        )
    (kind,) = kinds
    patterns = [glob.escape(file) for file in files]  # seqio expands them once more
    return seqio.FileDataSource(_READ[kind], {_SPLIT: patterns}, cycle_length=16 if shuffle else 1), _PARSE[kind]


def _open_tfds(source: Source, name: str, split: str) -> seqio.DataSource:
    """A dataset that has been prepared, its name with its version as seqio wants it; nothing is downloaded."""
    seqio.set_tfds_read_config_override(tfds.ReadConfig(add_tfds_id=True))
    try:
        dataset = seqio.TfdsDataSource(name, splits={_SPLIT: split}, read_only=True)
        features = dataset.tfds_dataset.info.features
        dataset.list_shards(_SPLIT)
    except Exception as error:  # whatever TFDS raises; the user needs one sentence
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"corpus.sources: path={source.path!r} is no prepared TFDS dataset: {reason}") from error
    if source.field not in features:
        raise ValueError(f"corpus.sources: field={source.field!r} of {source.path!r} is not {' or '.join(features)}")
    return dataset


def _record(origin: tf.Tensor, raw: tf.Tensor, intact: tf.Tensor | bool = True) -> dict[str, Any]:
    return {"origin": origin, "raw": raw, "intact": intact}


def _read_text(file: tf.Tensor) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensors(file).map(lambda file: _record(file, tf.io.read_file(file)))


def _read_lines(file: tf.Tensor) -> tf.data.Dataset:
    lines = tf.data.TextLineDataset(file).enumerate(start=1)
    return lines.map(lambda number, line: _record(tf.strings.join([file, ":", tf.strings.as_string(number)]), line))


def _read_tfrecord(file: tf.Tensor) -> tf.data.Dataset:
    """The records before anything corrupt, and one that is not intact in the place of the rest. TensorFlow leaves that
    out silently; it has when the records, and the 16 bytes that frame each, do not fill the file."""
    size = tf.numpy_function(lambda file: np.int64(tf.io.gfile.stat(file.decode()).length), [file], tf.int64)
    records = tf.data.TFRecordDataset(file).map(lambda raw: (raw, True)).ignore_errors()
    records = records.concatenate(tf.data.Dataset.from_tensors(("", False)))

    def count(state: Any, record: Any) -> Any:
        (number, read), (raw, intact) = state, record
        state = (number + 1, read + 16 + tf.cast(tf.strings.length(raw), tf.int64))
        origin = tf.strings.join([file, ":record ", tf.strings.as_string(number)])
        return state, {**_record(origin, raw, intact), "wanted": intact | (read != size)}

    return records.scan((np.int64(0), np.int64(0)), count).filter(lambda record: record["wanted"])


def _plain(raw: bytes, _: str) -> str:
    return raw.decode()


def _json_field(raw: bytes, field: str) -> str | None:
    record = json.loads(raw.decode())
    return record.get(field) if isinstance(record, dict) else None


def _example_field(raw: bytes, field: str) -> str | None:
    values = tf.train.Example.FromString(raw).features.feature[field].bytes_list.value
    return values[0].decode() if values else None


_READ = {".txt": _read_text, ".jsonl": _read_lines, ".tfrecord": _read_tfrecord}
_PARSE = {".txt": _plain, ".jsonl": _json_field, ".tfrecord": _example_field}


def _kind(file: str) -> str:
    """The format, or nothing. It may have the number of the file after it, as in `a.tfrecord-00000-of-00002`."""
    ending = re.search(r"(\.txt|\.jsonl|\.tfrecord)(-\d+-of-\d+)?$", file)
    return ending[1] if ending else ""
