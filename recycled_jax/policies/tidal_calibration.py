"""Which layer should select again? How much of each layer's own selection another layer's would have found.

TidalDecode's authors tune the second selection layer by the accuracy of a needle task. Measuring the recall of its
selections, as their analysis does (arXiv 2410.05076), needs one reading of a few prompts and no task; ours.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from recycled_jax.frame import Here, LastQueries, Prefilled, Scorer, Token, TopK


def layer_recall(
    prefilled: Prefilled, scorer: Scorer, selector: TopK, *, queries: int = 32, implementation: str | None = None
) -> Float[Array, "layers layers"]:
    """Share of the second layer's selection that the first layer's has: of its candidates, what is always kept aside.

    The mean over the prompts, their last `queries` tokens, each of which selects among the tokens up to itself, and the
    heads. The prompts must have been read with the observer `LastQueries(queries)`. A token that leaves no more than
    the budget to choose from says nothing and is left out; if none is left, all is NaN.
    """
    window = prefilled.prompts.seen(LastQueries(queries))
    cache = prefilled.cache
    lengths = prefilled.prompts.lengths[None, :] - queries + 1 + jnp.arange(queries)[:, None]

    def chosen(layer: Int[Array, ""], query: Int[Array, ""]) -> Bool[Array, "batch selections capacity"]:
        bare_q, q = window.bare_q[layer, :, :, query], window.q[layer, :, :, query]
        nothing = jnp.zeros((cache.batch, cache.kv_heads, cache.head_dim), q.dtype)
        here = Here(
            layer,
            jnp.maximum(lengths[query], 1),
            jnp.zeros((), jnp.int32),
            jnp.ones(cache.batch, bool),
            implementation=implementation,
        )
        scores = scorer.score(Token(bare_q, q, nothing, nothing), cache, (), here)
        slots = selector.select(scores, here.lengths, implementation=implementation)
        slots = slots[:, :, : selector.entries - selector.sinks - selector.recent]
        rows, heads = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, :, None]
        # an empty entry is sent past the end, where the scatter drops it
        slots = jnp.where(slots < 0, cache.capacity, slots)
        return jnp.zeros((*slots.shape[:2], cache.capacity), bool).at[rows, heads, slots].set(True, mode="drop")

    def of_query(query: Int[Array, ""]) -> tuple[Float[Array, "layers layers"], Int[Array, ""]]:
        sets = jax.lax.map(lambda layer: chosen(layer, query), jnp.arange(cache.layers)).astype(jnp.float32)
        shared = jnp.einsum("fbht,gbht->fgb", sets, sets) / sets.shape[2]
        size = selector.k - selector.sinks - selector.recent
        telling = lengths[query] > selector.k
        return jnp.sum(shared * telling[None, None, :], axis=-1) / size, jnp.sum(telling)

    recall, count = jax.lax.map(of_query, jnp.arange(queries))
    return jnp.sum(recall, axis=0) / jnp.sum(count)


def rank_selection_layers(
    recall: Float[Array | np.ndarray, "layers layers"], candidates: Sequence[int]
) -> Mapping[int, float]:
    """Mean recall, by each candidate's selection, of the layers above it; candidates in falling order of it.

    `recall` is that of `layer_recall`. Raises ValueError for a candidate that no layer is above.
    """
    layers = recall.shape[0]
    for candidate in candidates:
        if not 0 <= candidate < layers - 1:
            raise ValueError(f"candidate layer {candidate} has no layers above it; expected 0 to {layers - 2}")
    means = {candidate: float(np.mean(np.asarray(recall)[candidate, candidate + 1 :])) for candidate in candidates}
    return dict(sorted(means.items(), key=lambda item: -item[1]))
