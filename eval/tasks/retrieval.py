"""The questions that the embedded model was trained on, as tasks of an evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from eval.tasks.task import Haystack, Task
from recycled_jax.tasks.retrieval import TEMPLATE_VERSION, RetrievalTask, make_example


@dataclass(frozen=True)
class Retrieval(Task):
    """A fact, one of several, or a path of `hops` (`recycled_jax.tasks.retrieval`)."""

    keys: int = 1
    hops: int = 0
    digits: int = 7
    haystack: Haystack | None = None

    metric: ClassVar[str] = "all"
    version: ClassVar[int] = TEMPLATE_VERSION

    def example(self, *, length, seed, index, encode):
        return make_example(
            RetrievalTask(self.keys, self.hops, self.digits),
            length=length,
            seed=seed,
            index=index,
            encode=encode,
            haystack=self.haystack and self.haystack.sentences,
        )


EMBEDDED: Mapping[str, Callable[..., Task]] = {
    "single": Retrieval,
    "multikey": partial(Retrieval, keys=8),
    "chain": partial(Retrieval, keys=8, hops=4),
}
