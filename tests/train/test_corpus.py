"""Rows of a corpus, compared with a packing in plain Python; what is wrong with a corpus, and what is said of it.

Document n of a test is word n some times over, so that a token tells which document it is of.
"""

import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import train
from train import corpus as corpus_module
from train.config import Corpus, Source
from train.corpus import Position, Stream

BOS, EOS, FIRST = 0, 1, 2


def word_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Word `w7` is token FIRST + 7."""
    core = Tokenizer(models.WordLevel({"<s>": BOS, "</s>": EOS, **{f"w{n}": FIRST + n for n in range(500)}}, "<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


TOKENIZER = word_tokenizer("<s> $A")


def documents_of(lengths: Iterable[int], first: int = 0) -> list[str]:
    return [" ".join([f"w{number}"] * length) for number, length in enumerate(lengths, first)]


def as_tokens(documents: Sequence[str]) -> Iterator[int]:
    """Without end."""
    for document in itertools.cycle(documents):
        yield from [BOS, *(FIRST + int(word[1:]) for word in document.split()), EOS]


def write_txt(folder: Path, documents: Sequence[str]) -> str:
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:03}[a].txt").write_text(document)
    return str(folder / "*.txt")


def write_jsonl(folder: Path, documents: Sequence[str], files: int = 1) -> str:
    folder.mkdir()
    for number in range(files):
        lines = [json.dumps({"id": 1, "text": document}) + "\n" for document in documents[number::files]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return str(folder / "*.jsonl")


def write_tfrecord(folder: Path, documents: Sequence[str]) -> str:
    folder.mkdir()
    with tf.io.TFRecordWriter(str(folder / "a.tfrecord-00000-of-00001")) as file:
        for document in documents:
            text = tf.train.Feature(bytes_list=tf.train.BytesList(value=[document.encode()]))
            example = tf.train.Example(features=tf.train.Features(feature={"text": text}))
            file.write(example.SerializeToString())
    return str(folder / "*")


def stream(path: str | tuple[Source, ...], *, index=0, seed=0, state: Iterable[int] = (), **options) -> Stream:
    sources = (Source(path),) if isinstance(path, str) else path
    return Stream(Corpus(sources, **options), TOKENIZER, seed=seed, index=index, state=state)


def numbers(path: str | tuple[Source, ...], count: int, **options) -> list[int]:
    rows = stream(path, packing="truncate", **options)
    return [int(rows.row(2)[1]) - FIRST for _ in range(count)]


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_tfrecord])
def test_rows_are_the_documents_one_after_the_other(tmp_path, write):
    documents = documents_of([3, 1, 7, 2])
    rows = stream(write(tmp_path / "a", documents), shuffle=False)
    tokens = as_tokens(documents)
    for length in (1, 5, 8, 3, 40, 4):  # more than two epochs
        row = rows.row(length)
        assert row.dtype == np.int32
        assert row.tolist() == list(itertools.islice(tokens, length))
    assert rows.position == (11, 2, 0)


def test_tokenizer_that_ends_documents_itself(tmp_path):
    config = Corpus((Source(write_jsonl(tmp_path / "a", documents_of([1, 1]))),), shuffle=False)
    rows = Stream(config, word_tokenizer("<s> $A </s>"), seed=0, index=0)
    assert rows.row(6).tolist() == [BOS, FIRST, EOS, BOS, FIRST + 1, EOS]


@settings(max_examples=3)  # each is a second's work
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.lists(st.integers(1, 20), min_size=2, max_size=2))
def test_resumes_after_every_row(tmp_path_factory, sizes, lengths):
    folder = tmp_path_factory.mktemp("resumes")
    documents = documents_of(sizes)
    documents.insert(1, "")
    one = write_jsonl(folder / "one", documents)
    sources = (Source(one), Source(write_txt(folder / "two", documents_of([4, 4, 4], first=100)), rate=0.5))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out .*0\\.jsonl:2")
        rows = stream(sources)
        told = [(rows.row(length), rows.position) for length in (*lengths, 25)]
        for after, (_, position) in enumerate(told[:-1], 1):
            resumed = stream(sources, state=np.asarray(position))
            for length, (row, position) in zip((*lengths, 25)[after:], told[after:], strict=True):
                np.testing.assert_array_equal(resumed.row(length), row)
                assert resumed.position == position


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("files", [1, 2])
def test_streams_share_out_every_epoch(tmp_path, files, shuffle):
    path = write_jsonl(tmp_path / "a", documents_of([1] * 10), files)
    one, other = (numbers(path, 10, index=index, streams=2, shuffle=shuffle) for index in (0, 1))
    for epoch in (slice(0, 5), slice(5, 10)):
        assert sorted(one[epoch] + other[epoch]) == list(range(10))


def test_shuffles_every_epoch_anew(tmp_path):
    path = write_jsonl(tmp_path / "a", documents_of([1] * 12))
    told = numbers(path, 24)
    first, second = told[:12], told[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second and first != list(range(12))
    assert numbers(path, 24) == told
    assert numbers(path, 24, seed=1) != told


def test_draws_from_sources_by_their_rates(tmp_path):
    few, many = (write_jsonl(tmp_path / str(n), documents_of([1] * 90, first=n)) for n in (0, 100))
    sources = (Source(few, rate=1), Source(many, rate=3))
    told = [[number >= 100 for number in numbers(sources, 200, streams=2, index=index)] for index in (0, 1)]
    assert [np.mean(of_many) for of_many in told] == pytest.approx([0.75, 0.75], abs=0.08)
    assert told[0] != told[1]


def test_truncate_takes_the_beginning_of_documents_that_are_long_enough(tmp_path):
    rows = stream(write_jsonl(tmp_path / "a", documents_of([4, 2, 3, 9])), packing="truncate", shuffle=False)
    assert [rows.row(4).tolist() for _ in range(3)] == [[BOS, FIRST + n, FIRST + n, FIRST + n] for n in (0, 2, 3)]
    assert rows.position == (4, 0, 0)


def test_truncate_with_documents_that_are_all_too_short(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_SHORT", 30)
    rows = stream(write_jsonl(tmp_path / "a", documents_of([4, 2])), packing="truncate")
    with pytest.raises(ValueError, match=r"packing='truncate' needs 6 tokens: 30 documents in a row have fewer"):
        rows.row(6)


BAD_LINES = {
    b'{"text": "w0"': "Expecting ',' delimiter",
    b'{"body": "w0"}': "no text in the field 'text'",
    b'{"text": 7}': "no text in the field 'text'",
    b'["w0"]': "no text in the field 'text'",
    b'{"text": " \\n"}': "its text is empty",
    b'{"text": "w0 \xff"}': "can't decode byte 0xff",
    b'{"text": "w0 \\ud800"}': "surrogates not allowed",
    b"[" * 100_000: "recursion",
}


def test_bad_lines_are_named_counted_and_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*BAD_LINES, b'{"text": "w5"}']))
    rows = stream(str(tmp_path / "a.jsonl"), shuffle=False)
    with pytest.warns(UserWarning) as told:
        assert rows.row(3).tolist() == [BOS, FIRST + 5, EOS]
    assert rows.position == (len(BAD_LINES) + 1, 0, len(BAD_LINES))
    for line, (warning, reason) in enumerate(zip(told, BAD_LINES.values(), strict=True), 1):
        assert f"left out {tmp_path}/a.jsonl:{line}: " in str(warning.message)
        assert reason in str(warning.message)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"w0 \xff")
    (tmp_path / "b.txt").write_bytes(b"w1")
    with pytest.warns(UserWarning, match=r"left out .*a\.txt: 'utf-8' codec can't decode"):
        assert stream(str(tmp_path / "*"), shuffle=False).row(2).tolist() == [BOS, FIRST + 1]


@pytest.mark.parametrize("damage", ["byte", "end"])
def test_rest_of_a_corrupt_tfrecord_is_one_bad_record(tmp_path, damage):
    path = Path(write_tfrecord(tmp_path / "a", documents_of([1] * 4))).parent / "a.tfrecord-00000-of-00001"
    data = bytearray(path.read_bytes())
    quarter = len(data) // 4
    if damage == "byte":
        data[2 * quarter + 15] ^= 1
    path.write_bytes(data if damage == "byte" else data[: 2 * quarter + 15])
    with tf.io.TFRecordWriter(str(tmp_path / "a" / "b.tfrecord")) as file:
        file.write(b"no example")
        file.write(tf.train.Example().SerializeToString())
    rows = stream(f"{path.parent}/*", shuffle=False)
    with pytest.warns(UserWarning) as told:
        assert rows.row(9).tolist() == [BOS, FIRST, EOS, BOS, FIRST + 1, EOS, BOS, FIRST, EOS]
    corrupt, no_example, no_field = (str(warning.message) for warning in told)
    assert f"{path}:record 2: it is corrupt" in corrupt
    assert "b.tfrecord:record 0: " in no_example and "Example" in no_example
    assert "b.tfrecord:record 1: it has no text in the field 'text'" in no_field
    assert rows.position == (6, 0, 3)


def test_more_bad_records_than_are_accepted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "w1"}\n')
    rows = stream(str(tmp_path / "a.jsonl"), max_corrupt=2, shuffle=False)
    with pytest.warns(UserWarning, match=r"a\.jsonl:1"):
        rows.row(6)  # two epochs
    with pytest.raises(ValueError, match=r"max_corrupt=2 bad records are exceeded by .*a\.jsonl:1: its text is empty"):
        rows.row(1)


def write_tfds(folder: Path, documents: Sequence[str]) -> None:
    folder = folder / "little" / "1.0.0"
    folder.parent.mkdir()
    write_tfrecord(folder, documents)
    (folder / "a.tfrecord-00000-of-00001").rename(folder / "little-train.tfrecord-00000-of-00001")
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(documents)],
        num_bytes=1,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="little", split="train", filetype_suffix="tfrecord"
        ),
    )
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split])


def test_tfds(tmp_path):
    write_tfds(tmp_path, ["w0", "", "w2"])
    tfds.core.add_data_dir(tmp_path)
    for path in ("tfds:little:1.0.0", "tfds:little:1.0.0:train[:100%]"):
        rows = stream(path, shuffle=False)
        with pytest.warns(UserWarning, match=r"left out .*little-train\.tfrecord.*__1: its text is empty"):
            assert rows.row(6).tolist() == [BOS, FIRST, EOS, BOS, FIRST + 2, EOS]
    with pytest.raises(ValueError, match=r"field='body' of 'tfds:little:1.0.0' is not text"):
        stream((Source("tfds:little:1.0.0", field="body"),))
    for path, reason in (("tfds:little:1.0.0:test", "test"), ("tfds:little", "version number")):
        with pytest.raises(ValueError, match=rf"path='{path}' is no prepared TFDS dataset: .*{reason}"):
            stream(path)


def test_too_few_documents_or_files(tmp_path):
    path = write_jsonl(tmp_path / "a", documents_of([1, 1, 1]))
    stream(path, streams=4, index=2)
    with pytest.raises(ValueError, match=r"3 documents in 1 files, none of them for stream 3 of corpus.streams=4"):
        stream(path, streams=4, index=3)
    (tmp_path / "a" / "1.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"3 documents in 2 files, none of them for stream 1 of corpus.streams=2"):
        stream(f"{path}*", streams=2, index=1)


def test_files_that_cannot_be_a_source(tmp_path):
    with pytest.raises(ValueError, match=r"path='.*/none\*' must match files of one kind, .*; it matches no file"):
        stream(f"{tmp_path}/none*")
    for name in ("a.txt", "b.jsonl", "c.md"):
        (tmp_path / name).write_text("w0")
    with pytest.raises(ValueError, match=r"files of one kind, \.txt, .*; it matches .*/a\.txt, .*/b\.jsonl"):
        stream(f"{tmp_path}/[ab]*")
    with pytest.raises(ValueError, match=r"it matches .*/c\.md"):
        stream(f"{tmp_path}/c.md")


def test_arguments_that_do_not_fit(tmp_path):
    path = write_jsonl(tmp_path / "a", documents_of([1]))
    with pytest.raises(ValueError, match=r"index=1 must be at least 0 and below streams=1"):
        stream(path, index=1)
    with pytest.raises(ValueError, match=r"tokens=3, bad=0\) is beyond its document's end"):
        stream(path, state=Position(tokens=3)).row(1)
    without_eos = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ValueError, match=r"needs a tokenizer with an EOS token"):
        Stream(Corpus((Source(path),)), without_eos, seed=0, index=0)


def test_only_a_stream_needs_the_extra(tmp_path, monkeypatch):
    root = Path(train.__file__).parent.parent
    files = [file for package in ("train", "eval", "recycled_jax") for file in (root / package).rglob("*.py")]
    needs = re.compile(r"^( *)(import|from) (tensorflow|seqio)", re.MULTILINE)
    indents = {(file.name, indent > "") for file in files for indent, *_ in needs.findall(file.read_text())}
    assert indents == {("corpus.py", True)}
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(ValueError, match=r"needs seqio, which is missing: pip install 'recycled-jax\[train\]'"):
        stream(write_jsonl(tmp_path / "a", documents_of([1])))


def test_tensorflow_leaves_accelerators_to_jax():
    assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}
