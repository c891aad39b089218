"""Layer plans: which layers read the whole cache, which make a selection, which take the one made below them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

# `dense`: reads everything at every step. `select`: makes a selection. `follow`: takes that of the nearest layer below
# which makes one.
Role = Literal["dense", "select", "follow"]


@dataclass(frozen=True)
class LayerPlan:
    """Layers by number, from 0. `select` None: every layer that is not `dense` selects for itself."""

    dense: tuple[int, ...] = ()
    select: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        both = sorted(set(self.dense) & set(self.select or ()))
        if both:
            raise ValueError(f"layer {both[0]} is among the dense layers and among the selection layers")

    def roles(self, layers: int) -> list[Role]:
        """The role of each layer of a model. Raises ValueError, naming the layer, where the plan does not fit it."""
        for layer in (*self.dense, *(self.select or ())):
            if not 0 <= layer < layers:
                raise ValueError(f"layer {layer} is in the layer plan, the model has layers 0 to {layers - 1}")
        roles: list[Role] = []
        for layer in range(layers):
            if layer in self.dense:
                roles.append("dense")
            elif self.select is None or layer in self.select:
                roles.append("select")
            elif "select" in roles:
                roles.append("follow")
            else:
                raise ValueError(
                    f"layer {layer} is neither a dense nor a selection layer, and no selection layer is below it"
                )
        return roles

    def runs(self, layers: int) -> Iterator[tuple[Role, range]]:
        """Neighbouring layers of one role, bottom up."""
        first = 0
        for role, group in groupby(self.roles(layers)):
            last = first + len(list(group))
            yield role, range(first, last)
            first = last


EVERY_LAYER = LayerPlan()
