"""What an evaluation is made of: one typed dataclass, filled from YAML and from flags, checked on construction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from recycled_jax.distributed import Distributed
from recycled_jax.mesh import MeshSizes
from recycled_jax.named import knobs_of
from recycled_jax.policies import Policy, make_policy
from recycled_jax.policies.registry import POLICIES
from recycled_jax.sampling import Sampling
from recycled_jax.state import CacheDtype

# A name, or a mapping with a name and what else is to be set.
Named = str | dict[str, Any]


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation: every policy with every budget on the same examples of every task at every length.

    `out` gets a folder for each policy. `model` is a checkpoint's folder, or a name in the local Hugging Face cache;
    the embedded one if there is none. `policies` are names, or mappings like `{name: recycled, stride: 8}`; those that
    have a `k` and do not set it run once for each of `budgets`. `tasks` are names likewise: `rs_vt`,
    `{name: rs_needle, distractors: 32}`, RULER's own files `{name: ruler, path: FILE}` or a folder of them, and text
    `{name: perplexity, documents: [FILE, …]}`. With `preset` small, generated tasks suit small models.

    `lengths` are in tokens, prompt and answer together, and at most `max_length` (the model's own if not given).
    Each cell has `examples` examples, drawn by `seed` and answered `batch` at a time. With `question` prefill, prompts
    are read to their end; with decode, the questions of generated tasks are read after the rest, over what the policy
    has kept. `template` chat puts prompts into the tokenizer's chat template. Prose to hide facts in is generated, or
    that of the file `haystack`.

    Batches with one of the first `analysis` questions of a cell are decoded once more, to measure the attention mass on
    the selections, which reads all keys; another number is another run. `store_input` false keeps a digest of each
    prompt instead of its text. `fresh` makes new folders beside those that are there instead of going on. `chunk`
    tokens of a prompt are read at a time. With `cache_dtype` int8 the cache takes half of bfloat16's bytes; the bytes
    that results tell are still those of `dtype`. With a `mesh` the model lies on all devices of a process: rows over
    `data`, heads over `tensor`, and the cache of a row over `sequence`. With `distributed` this is one of many
    processes, which share the examples and the folder `out`.
    """

    out: str = "results"
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache_dtype: CacheDtype | None = None
    policies: tuple[Named, ...] = ("full", "recycled")
    budgets: tuple[int, ...] = ()
    tasks: tuple[Named, ...] = ("single", "multikey", "chain")
    preset: Literal["full", "small"] = "full"
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    max_length: int | None = None
    examples: int = 100
    seed: int = 42
    batch: int = 8
    question: Literal["prefill", "decode"] = "prefill"
    template: Literal["none", "chat"] = "none"
    haystack: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    analysis: int = 0
    store_input: bool = True
    fresh: bool = False
    chunk: int = 512
    implementation: str | None = None
    mesh: MeshSizes | None = None
    distributed: Distributed | None = None

    def __post_init__(self) -> None:
        for name in ("policies", "tasks", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[] must name at least one")
        for name in ("examples", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.analysis < 0:
            raise ValueError(f"analysis={self.analysis} must be at least 0")
        for name in ("lengths", "budgets"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name} has {value}, expected numbers of at least 1")
        for entry in self.tasks:
            split(entry)
        if self.cache_dtype is not None and self.mesh is not None and self.mesh.sequence != 1:
            raise ValueError(
                f"cache_dtype={self.cache_dtype!r} is not for a mesh that divides slots, sequence={self.mesh.sequence}"
            )
        if self.fresh and self.distributed is not None:
            raise ValueError("fresh=True cannot be agreed on by many processes; name another out")
        chosen(self.policies, self.budgets)


@dataclass(frozen=True)
class Chosen:
    """A policy with the knobs that make it, those at their defaults too."""

    name: str
    knobs: dict[str, Any] = field(hash=False)
    policy: Policy

    @property
    def title(self) -> str:
        """For a folder's name and for progress."""
        k = self.knobs.get("k")
        return self.name if k is None else f"{self.name}-k{k}"


def chosen(policies: Sequence[Named], budgets: Sequence[int]) -> list[Chosen]:
    """The policies that entries name: those that have a `k` and do not set it, with each of the budgets.

    Raises ValueError for an unknown name or knob, for knobs that the policy refuses, and for two that are the same.
    """
    made = []
    for entry in policies:
        name, knobs = split(entry)
        valid = knobs_of("policy", POLICIES, name)
        swept = budgets if "k" in valid and "k" not in knobs else ()
        for with_budget in [{"k": k} for k in swept] or [{}]:
            given = {**knobs, **with_budget}
            policy = make_policy(name, **given)
            made.append(Chosen(name, {knob: given.get(knob, default) for knob, (_, default) in valid.items()}, policy))
    for place, one in enumerate(made):
        if any(one.name == other.name and one.knobs == other.knobs for other in made[:place]):
            raise ValueError(f"policies has {one.title} twice with the same knobs, expected each once")
    return made


def split(entry: Named) -> tuple[str, dict[str, Any]]:
    """The name of an entry, and the rest of it, lists as tuples. Raises ValueError where there is no name."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry.get("name"), str):
        raise ValueError(f"{entry} has no name, expected a name or a mapping like {{name: recycled, k: 256}}")
    rest = {name: value for name, value in entry.items() if name != "name"}
    return entry["name"], {name: tuple(value) if isinstance(value, list) else value for name, value in rest.items()}


def couples_rows(policy: Policy) -> bool:
    """Whether what one row of a batch does depends on the others: then results depend on how examples are batched."""
    return getattr(policy.method, "rows", "per_row") != "per_row"


def up_to_multiple(value: int, of: int) -> int:
    return math.ceil(value / of) * of
