"""What a training run is made of: typed dataclasses, filled from YAML and from flags, checked on construction."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from recycled_jax.cca import CCA
from recycled_jax.distributed import Distributed
from recycled_jax.mesh import MeshSizes
from recycled_jax.model import Remat
from recycled_jax.recycled_attention import RecycledAttention
from recycled_jax.tasks.words import KEYS


def _check(settings: Any, prefix: str, names: Iterable[str], *, at_least: float, at_most: float = math.inf) -> None:
    for name in names:
        value = getattr(settings, name)
        if not at_least <= value <= at_most:
            bounds = f"at least {at_least}" if at_most == math.inf else f"between {at_least} and {at_most}"
            raise ValueError(f"{prefix}{name}={value} must be {bounds}")


@dataclass(frozen=True)
class ModelSizes:
    """A model trained from scratch; `mlp` and `embed` are widths, `max_length` is in tokens.

    `init` other than `plain` is explained in `train.init`. Or `start` is the folder of a checkpoint, Hugging Face's or
    orbax's, to go on from, which then tells all of that. `cca`, if given, is what the model attends instead of
    everything (`recycled_jax.cca`); decode with the policy of that name. `recycled`, if given, trains it to be decoded
    with recycled attention (`recycled_jax.recycled_attention`): the last `chunks` × `stride` tokens of every sequence
    attend as they would then.
    """

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "qwen2"
    init: Literal["plain", "retrieval"] = "retrieval"
    embed: int = 192
    mlp: int = 320
    layers: int = 4
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    max_length: int = 32768
    start: str | None = None
    cca: CCA | None = None
    recycled: RecycledAttention | None = None

    def __post_init__(self) -> None:
        if self.cca is not None and self.recycled is not None:
            raise ValueError("model.cca and model.recycled are both given; a model attends in one way, leave one out")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if self.start is not None and setting.name not in ("start", "cca", "recycled") and value != setting.default:
                raise ValueError(
                    f"model.{setting.name}={value!r} is told by the checkpoint model.start={self.start!r}; leave it out"
                )


@dataclass(frozen=True)
class Stage:
    """Consecutive steps at one sequence length: `batch` rows of `length` tokens, at most `facts` facts in each.

    A token of an answer weighs 1 in the loss, one of the filler `text_weight`; `skip_share` of the rows have skips in
    their positions, up to `Data.max_position`. The gradient of a batch is computed in `accumulate` parts, one after the
    other, for batches whose activations do not fit at once; the result is the same.
    """

    length: int
    batch: int
    steps: int
    facts: int = 8
    text_weight: float = 0.1
    skip_share: float = 0.7
    accumulate: int = 1

    def __post_init__(self) -> None:
        _check(self, "stages: ", ("length", "batch", "steps", "accumulate"), at_least=1)
        if self.batch % self.accumulate:
            raise ValueError(f"stages: batch={self.batch} must be a multiple of accumulate={self.accumulate}")
        _check(self, "stages: ", ("text_weight",), at_least=0)
        _check(self, "stages: ", ("skip_share",), at_least=0, at_most=1)
        _check(self, "stages: ", ("facts",), at_least=1, at_most=len(KEYS))


@dataclass(frozen=True)
class Data:
    """The retrieval mixture. `texts` are UTF-8 files used as filler beside the generated prose."""

    texts: tuple[str, ...] = ()
    text_share: float = 0.6
    chain_share: float = 0.15
    digits: tuple[int, int] = (5, 7)
    max_position: int = 16384
    tokenizer_merges: int = 1689

    def __post_init__(self) -> None:
        _check(self, "data.", ("text_share", "chain_share"), at_least=0, at_most=1)
        _check(self, "data.", ("max_position",), at_least=1)
        _check(self, "data.", ("tokenizer_merges",), at_least=0)
        low, high = self.digits
        if not 1 <= low <= high <= 18:
            raise ValueError(f"data.digits={list(self.digits)} must be two numbers of digits, 1 <= low <= high <= 18")


@dataclass(frozen=True)
class Source:
    """Documents of a corpus. `path` is a glob pattern of files, `.txt` (a document each), `.jsonl` (a document a line)
    or `.tfrecord` (of tf.Example), or `tfds:NAME:VERSION` or `tfds:NAME:VERSION:SPLIT`, which TensorFlow Datasets has
    prepared. `field` holds the text, where there are fields. Documents are drawn from sources in proportion to `rate`.
    """

    path: str
    field: str = "text"
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"corpus.sources: rate={self.rate} of {self.path!r} must be above 0")


@dataclass(frozen=True)
class Corpus:
    """Text to train on. `packing`: documents one after the other (`concatenate`), or one document a row, cut to length,
    without the shorter ones (`truncate`, as in the paper).

    Rows come from `streams` streams of documents, each with its share of every source: a host reads those of its own
    rows, so that there should be at least as many streams as hosts. What is read does not depend on the hosts. Records
    that are empty or cannot be read are left out; when there are more than `max_corrupt` in a stream, counted each time
    it comes by them, the run ends.
    """

    sources: tuple[Source, ...]
    packing: Literal["concatenate", "truncate"] = "concatenate"
    streams: int = 1
    shuffle: bool = True
    max_corrupt: int = 100

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("corpus.sources=[] must have at least one source")
        _check(self, "corpus.", ("streams",), at_least=1)
        _check(self, "corpus.", ("max_corrupt",), at_least=0)


@dataclass(frozen=True)
class Evaluation:
    """After every `every` steps and after the last: `examples` questions of each retrieval task, `length` tokens long,
    and with `texts` (UTF-8 files, held out from training) the perplexity of the last `scored` tokens of `examples`
    pieces of `length` tokens, in full attention and as decoded with recycled attention, `k` tokens (1/8 of the length
    if not given) selected anew at every one of `strides` steps.
    """

    every: int = 200
    examples: int = 32
    length: int = 1024
    retrieval: bool = True
    texts: tuple[str, ...] = ()
    scored: int = 50
    strides: tuple[int, ...] = (10, 25, 50)
    k: int | None = None

    def __post_init__(self) -> None:
        _check(self, "evaluation.", ("every", "examples", "length", "scored"), at_least=1)
        if self.k is not None:
            _check(self, "evaluation.", ("k",), at_least=1)
        for stride in self.strides:
            if stride < 1 or self.scored % stride:
                raise ValueError(f"evaluation.strides has {stride}, which must divide scored={self.scored}")
        k = self.length // 8 if self.k is None else self.k
        if self.texts and max(self.strides, default=0) > k:
            raise ValueError(f"evaluation.strides has {max(self.strides)}, which must be at most the selection's k={k}")
        if self.scored >= self.length:
            raise ValueError(f"evaluation.scored={self.scored} must be below length={self.length}")


@dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon (optax), linear warm-up over `warmup` steps, then by `schedule` to `final` of the peak rate. `b1`,
    `b2` and `eps` are AdamW's."""

    name: Literal["adamw", "muon"] = "muon"
    learning_rate: float = 1e-2
    warmup: int = 100
    schedule: Literal["cosine", "linear"] = "cosine"
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    clip: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "optimizer.", ("warmup", "weight_decay"), at_least=0)
        _check(self, "optimizer.", ("final", "b1", "b2"), at_least=0, at_most=1)
        for name in ("learning_rate", "clip", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True)
class TrainConfig:
    """One run. `out` holds checkpoints, metrics and, at the end, the exported Hugging Face folder.

    It trains on `corpus`, or on the retrieval mixture `data` if there is none. The newest `keep` checkpoints are kept,
    and every one whose step is a multiple of `keep_every`. Metrics go to `metrics.jsonl`, and with `tensorboard` to
    `tensorboard/`; a profile of the steps from `profile[0]` up to `profile[1]`, counted from 0, to `profile/`. With
    `distributed` this is one of many processes of a run, usually on as many hosts.

    Activations are `dtype`; parameters and optimiser moments are float32; the exported weights are `export_dtype`.
    `remat` is what the backward pass computes again instead of keeping: `none`, everything but the products with
    weights (`dots`), or all of a layer (`full`). With `ema`, evaluation and export are of the exponential average of
    the parameters with that decay.
    `z_loss` times the squared log of the softmax's normaliser is added to the loss, which keeps logits from drifting
    (PaLM, arXiv 2204.02311, section 5, with 1e-4). Steps with a loss or a gradient that is not finite change nothing;
    after `max_skipped` of them in a row the run ends with an error.
    """

    out: str = "runs/embedded"
    seed: int = 0
    model: ModelSizes = field(default_factory=ModelSizes)
    data: Data = field(default_factory=Data)
    corpus: Corpus | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: MeshSizes = field(default_factory=MeshSizes)
    stages: tuple[Stage, ...] = (Stage(length=256, batch=16, steps=1000),)
    save_every: int = 200
    keep: int = 2
    keep_every: int | None = None
    log_every: int = 10
    tensorboard: bool = False
    profile: tuple[int, int] | None = None
    distributed: Distributed | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    z_loss: float = 0.0
    ema: float = 0.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages=[] must have at least one stage")
        if self.model.recycled is not None:
            for stage in self.stages:
                try:
                    self.model.recycled.prefix(stage.length)
                except ValueError as error:
                    raise ValueError(f"stages: length={stage.length} with model.recycled: {error}") from error
        if self.model.cca is not None and self.evaluation.texts and self.evaluation.strides:
            raise ValueError(
                f"evaluation.strides={list(self.evaluation.strides)} must be [] with model.cca, which decodes as itself"
            )
        _check(self, "", ("seed", "z_loss"), at_least=0)
        _check(self, "", ("save_every", "keep", "log_every", "max_skipped"), at_least=1)
        if self.keep_every is not None:
            _check(self, "", ("keep_every",), at_least=1)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be at least 0 and below 1")
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"profile={list(self.profile)} must be a first step and one after the last")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` (counted from 0) belongs to. Raises ValueError for one behind the last."""
        end = 0
        for stage in self.stages:
            end += stage.steps
            if step < end:
                return stage
        raise ValueError(f"step={step} must be below the run's steps={end}")
