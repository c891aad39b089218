"""What a training run is made of: typed dataclasses, filled from YAML and from flags, checked on construction."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from recycled_jax.cca import CCA
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

    `init` other than `plain` is explained in `train.init`. Or `start` is the folder of a Hugging Face checkpoint to go
    on from, which then tells all of that. `cca`, if given, is what the model attends instead of everything
    (`recycled_jax.cca`); decode with the policy of that name. `recycled`, if given, trains it to be decoded with
    recycled attention (`recycled_jax.recycled_attention`): the last `chunks` × `stride` tokens of every sequence attend
    as they would then.
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
class Mesh:
    """Devices along each mesh axis; -1 takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh={asdict(self)} must have sizes of at least 1, or -1 in one place")


@dataclass(frozen=True)
class TrainConfig:
    """One run. `out` holds checkpoints, metrics and, at the end, the exported Hugging Face folder.

    Activations are `dtype`; parameters and optimiser moments are float32; the exported weights are `export_dtype`.
    `z_loss` times the squared log of the softmax's normaliser is added to the loss, which keeps logits from drifting
    (PaLM, arXiv 2204.02311, section 5, with 1e-4). Steps with a loss or a gradient that is not finite change nothing;
    after `max_skipped` of them in a row the run ends with an error.
    """

    out: str = "runs/embedded"
    seed: int = 0
    model: ModelSizes = field(default_factory=ModelSizes)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    stages: tuple[Stage, ...] = (Stage(length=256, batch=16, steps=1000),)
    save_every: int = 200
    keep: int = 2
    evaluate_every: int = 200
    evaluate_examples: int = 32
    evaluate_length: int = 1024
    log_every: int = 10
    dtype: Literal["float32", "bfloat16"] = "float32"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    z_loss: float = 0.0
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
        _check(self, "", ("seed", "z_loss"), at_least=0)
        _check(
            self,
            "",
            ("save_every", "keep", "evaluate_every", "evaluate_examples", "log_every", "max_skipped"),
            at_least=1,
        )

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` (counted from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]
