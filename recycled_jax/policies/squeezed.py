"""Squeezed Attention: of a fixed prompt, the clusters of keys that a query is likely enough to attend."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache, gather_attention
from recycled_jax.frame import Attended, LastQueries, Method
from recycled_jax.frame.method import Axes, selecting_trace
from recycled_jax.policies import kmeans
from recycled_jax.policies.policy import Policy
from recycled_jax.policies.tactic import capped


@struct.dataclass
class Level:
    """Clusters by their centroids and by how many slots are in each; none in an empty or spare one."""

    centroids: Float[Array, "*layers batch kv_heads clusters head_dim"]  # float32, of keys as they are
    counts: Int[Array, "*layers batch kv_heads clusters"]

    def shares(
        self, q: Float[Array, "batch query_heads queries head_dim"], kept: Bool[Array, "batch kv_heads clusters"] | None
    ) -> Float[Array, "batch kv_heads clusters"]:
        """The estimated attention of each slot of a cluster: exp(q·c) over the sum of it for all slots in clusters that
        are `kept`, 0 in the others; mean over the queries, then the largest of the group."""
        batch, heads, _, head_dim = self.centroids.shape
        grouped = q.astype(jnp.float32).reshape(batch, heads, -1, q.shape[2], head_dim)
        logits = jnp.einsum("bkgqd,bkcd->bkgqc", grouped, self.centroids, precision=lax.Precision.HIGHEST)
        counts = self.counts if kept is None else jnp.where(kept, self.counts, 0)
        counts = counts[:, :, None, None, :]
        logits = jnp.where(counts > 0, logits * head_dim**-0.5, -jnp.inf)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        powers = jnp.exp(logits - jnp.maximum(largest, jnp.finfo(jnp.float32).min))
        # the largest power is 1, so a sum below 1 is that of no clusters at all
        shares = powers / jnp.maximum(jnp.sum(counts * powers, axis=-1, keepdims=True), 1)
        return jnp.max(jnp.mean(shares, axis=3), axis=2)

    def passing(
        self, shares: Float[Array, "batch kv_heads clusters"], threshold: Float[Array, " batch"]
    ) -> Bool[Array, "batch kv_heads clusters"]:
        """The clusters with a share above the threshold, and an only one (ours): its share is the same for any query,
        and where every head has only one, so is the threshold."""
        only_one = jnp.sum(self.counts > 0, axis=-1, keepdims=True) == 1
        return (shares > threshold[:, None, None]) | only_one

    def filled(self) -> Float[Array, " batch"]:
        """Clusters with slots, mean over the heads."""
        return jnp.mean(jnp.sum(self.counts > 0, axis=-1), axis=-1)


@struct.dataclass
class Coarse:
    """Clusters of fine clusters."""

    level: Level
    parents: Int[Array, "*layers batch kv_heads fine"]  # the coarse cluster of each fine one, -1 of empty ones

    def kept(
        self, q: Float[Array, "batch query_heads queries head_dim"], threshold: Float[Array, " batch"]
    ) -> Bool[Array, "batch kv_heads fine"]:
        """The fine clusters whose coarse one passes."""
        passed = self.level.passing(self.level.shares(q, None), threshold)
        return (self.parents >= 0) & jnp.take_along_axis(passed, jnp.maximum(self.parents, 0), axis=-1)


@struct.dataclass
class Thresholds:
    """A slot is attended if its estimated attention is above the one of its level; one for all layers and heads."""

    fine: Float[Array, " batch"]
    coarse: Float[Array, " batch"]


@struct.dataclass
class SqueezedState:
    """`clustered` counts the slots in clusters, the first ones of the prompt; the later ones are attended anyway.
    `overflow` counts the slots left out for want of room in k, over steps and kv heads."""

    fine: Level  # with an axis of layers before the others
    labels: Int[Array, "layers batch kv_heads capacity"]  # the fine cluster of each slot, -1 for those in none
    coarse: Coarse | None
    thresholds: Thresholds
    clustered: Int[Array, " batch"]
    overflow: Int[Array, "layers batch"]


@dataclass(frozen=True)
class DirectionClusters:
    """k-means from a k-means++ start over L2-normalised vectors, one cluster for every `size` slots; centroids are the
    means of the vectors as they are."""

    size: int
    iterations: int
    seed: int

    def make(
        self,
        vectors: Float[Array, "batch kv_heads vectors head_dim"],
        valid: Bool[Array, "batch kv_heads vectors"],
        slots: Int[Array, " batch"],
        most: int,
    ) -> tuple[Float[Array, "batch kv_heads clusters head_dim"], Int[Array, "batch kv_heads vectors"]]:
        """Centroids, 0 where a cluster is empty, and labels, -1 where there is no vector; `most` is the number of slots
        that there could be."""
        vectors = jnp.where(valid[..., None], vectors.astype(jnp.float32), 0)
        norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        directions = vectors / jnp.where(norms > 0, norms, 1)
        number = max(1, most // self.size)
        in_use = jnp.minimum(jnp.maximum(slots // self.size, 1)[:, None], jnp.sum(valid, axis=-1))
        start = kmeans.spread_start(directions, valid, clusters=number, seed=self.seed)
        found = kmeans.lloyd(directions, valid, start, in_use, iterations=self.iterations)
        sums = _sum_by(found.labels, vectors, number)
        return sums / jnp.maximum(found.counts, 1)[..., None], found.labels


@dataclass(frozen=True)
class Squeezed(Method):
    """Attends the slots of the prompt whose estimated attention is above a threshold, the observation window at the
    prompt's end, and everything since.

    The threshold is the quantile `quantile` of the estimates for the queries of the observation window, over all
    layers, heads and clustered slots. With coarse clusters, slots must pass theirs first (`coarse_quantile`), and the
    fine estimates count only slots that do, also where the fine threshold is made (ours: the release makes it from
    estimates over all slots). Of more than `k` slots the newest of those always kept stay, then the highest estimates.
    """

    fine: DirectionClusters
    coarse: DirectionClusters | None
    quantile: float
    coarse_quantile: float
    window: int
    k: int

    def __post_init__(self) -> None:
        for name, value in (("quantile", self.quantile), ("coarse_quantile", self.coarse_quantile)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be between 0 and 1")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: the prompt's last queries set the threshold")
        if self.k <= self.window:
            raise ValueError(
                f"k={self.k} must be above window={self.window}: the observation window and the current token are "
                "always read; raise k or shorten the window"
            )

    @property
    def axes(self):
        coarse = "" if self.coarse is None else f" within clusters of {self.coarse.size}"
        scorer = f"clusters of {self.fine.size} keys{coarse}"
        return Axes(
            scorer, f"threshold(quantile={self.quantile}, k={self.k})", "every-step; clusters of the prompt once"
        )

    @property
    def observers(self):
        return (LastQueries(self.window),)

    def begin(self, prefilled, *, implementation):
        cache, lengths = prefilled.cache, prefilled.prompts.lengths
        queries = prefilled.prompts.seen(LastQueries(self.window)).q
        clustered = jnp.maximum(lengths - self.window, 0)
        layers = jnp.arange(cache.layers)
        fine, labels, coarse = lax.map(lambda layer: self._clusters(cache, layer, clustered), layers)
        return SqueezedState(
            fine,
            labels,
            coarse,
            self._thresholds(fine, coarse, queries),
            clustered,
            jnp.zeros((cache.layers, cache.batch), jnp.int32),
        )

    def attend(self, role, token, cache, state: SqueezedState, handed, here):
        assert cache is not None
        with jax.named_scope("attention/select"):
            fine, labels, coarse = jax.tree.map(lambda x: x[here.layer], (state.fine, state.labels, state.coarse))
            shares, passed, scored = _estimate(fine, coarse, token.q, state.thresholds)
            in_cluster, labels = labels >= 0, jnp.maximum(labels, 0)
            slots = jnp.arange(cache.capacity)[None, None, :]
            always = (slots >= state.clustered[:, None, None]) & (slots < here.lengths[:, None, None])
            wanted = always | (in_cluster & jnp.take_along_axis(passed, labels, axis=-1))
            # shares are at most 1; slots are exact in float32 below 2^24
            weaker = jnp.where(wanted, jnp.take_along_axis(shares, labels, axis=-1), -1)
            strength = jnp.where(always, 2.0 + slots, weaker)
            positions, left_out = capped(strength, wanted, k=self.k, here=here)
        with jax.named_scope("attention/selection"):
            output = gather_attention(token.q, cache, positions, **here.to_op)
        state = dataclasses.replace(state, overflow=state.overflow.at[here.layer].add(left_out))
        return Attended(output, state, handed, selecting_trace(positions, scored, here), positions)

    def _clusters(
        self, cache: KVCache, layer: Int[Array, ""] | int, clustered: Int[Array, " batch"]
    ) -> tuple[Level, Int[Array, "batch kv_heads capacity"], Coarse | None]:
        """Of one layer's first `clustered` keys."""
        slots = jnp.arange(cache.capacity)[None, None, :] < clustered[:, None, None]
        valid = jnp.broadcast_to(slots, (cache.batch, cache.kv_heads, cache.capacity))
        centroids, labels = self.fine.make(cache.keys(layer), valid, clustered, cache.capacity)
        counts = _sum_by(labels, jnp.ones((*labels.shape, 1), jnp.int32), centroids.shape[2])[..., 0]
        fine = Level(centroids, counts)
        if self.coarse is None:
            return fine, labels, None
        rough, parents = self.coarse.make(centroids, counts > 0, clustered, cache.capacity)
        level = Level(rough, _sum_by(parents, counts[..., None], rough.shape[2])[..., 0])
        return fine, labels, Coarse(level, parents)

    def _thresholds(
        self, fine: Level, coarse: Coarse | None, queries: Float[Array, "layers batch query_heads window head_dim"]
    ) -> Thresholds:
        """From the observation window as one block of queries; a row without clusters gets any."""
        rough, kept = jnp.zeros(queries.shape[1]), None
        if coarse is not None:
            shares = _by_layer(lambda level, q: level.shares(q, None), coarse.level, queries)
            rough = pooled_quantile(shares, coarse.level.counts, self.coarse_quantile)
            kept = _by_layer(lambda layer, q: layer.kept(q, rough), coarse, queries)
        shares = _by_layer(lambda level, q, k: level.shares(q, k), fine, queries, kept)
        return Thresholds(pooled_quantile(shares, fine.counts, self.quantile), rough)


def _estimate(
    fine: Level,
    coarse: Coarse | None,
    q: Float[Array, "batch query_heads head_dim"],
    thresholds: Thresholds,
) -> tuple[Float[Array, "batch kv_heads fine"], Bool[Array, "batch kv_heads fine"], Float[Array, " batch"]]:
    """Of each fine cluster: the estimated attention of its slots, and whether that passes; and the centroids read."""
    block = q[:, :, None]  # of one query
    if coarse is None:
        shares, read = fine.shares(block, None), fine.filled()
        return shares, fine.passing(shares, thresholds.fine), read
    kept = coarse.kept(block, thresholds.coarse)
    shares = fine.shares(block, kept)
    read = coarse.level.filled() + Level(fine.centroids, jnp.where(kept, fine.counts, 0)).filled()
    return shares, kept & fine.passing(shares, thresholds.fine), read


def _by_layer(function, *arguments):
    """One layer after the other: a window's products with all centroids of all layers would be too large."""
    return lax.map(lambda of_layer: function(*of_layer), arguments)


def pooled_quantile(
    shares: Float[Array, "layers batch kv_heads clusters"],
    counts: Int[Array, "layers batch kv_heads clusters"],
    quantile: float,
) -> Float[Array, " batch"]:
    """Of each row, over all layers, heads and slots, where all slots of a cluster have its share; between two slots
    linear. Any number for a row without slots."""
    values, times = (jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in (shares, counts))
    order = jnp.argsort(values, axis=-1)
    values, times = jnp.take_along_axis(values, order, axis=-1), jnp.take_along_axis(times, order, axis=-1)
    up_to = jnp.cumsum(times, axis=-1)
    total = up_to[:, -1:]
    place = quantile * (total - 1).astype(jnp.float32)
    lower = jnp.floor(place).astype(jnp.int32)

    def at(rank):
        return jnp.take_along_axis(values, jnp.argmax(up_to > rank, axis=-1, keepdims=True), axis=-1)

    low, high = at(lower), at(jnp.minimum(lower + 1, total - 1))
    return (low + (place - lower) * (high - low))[:, 0]


def _sum_by(
    labels: Int[Array, "batch kv_heads vectors"], vectors: jax.Array, number: int
) -> Float[Array, "batch kv_heads clusters width"] | Int[Array, "batch kv_heads clusters width"]:
    """Sums of the vectors of each label; those labelled -1 count nowhere."""
    rows, heads = jnp.arange(labels.shape[0])[:, None, None], jnp.arange(labels.shape[1])[None, :, None]
    labels = jnp.where(labels >= 0, labels, number)
    sums = jnp.zeros((*labels.shape[:2], number, vectors.shape[-1]), vectors.dtype)
    return sums.at[rows, heads, labels].add(vectors, mode="drop")


def squeezed(
    k: int = 1024,
    cluster_size: int = 20,
    quantile: float = 0.9,
    coarse_size: int | None = None,
    coarse_quantile: float = 0.7,
    window: int = 100,
    iterations: int = 300,
    seed: int = 0,
) -> Policy:
    """Squeezed Attention: the prompt's keys are clustered once; a step attends the slots in clusters whose estimated
    attention is above one threshold for the model, the prompt's last `window` slots and all since; `coarse_size` slots
    per coarse cluster add a second level (Hooper et al., arXiv 2411.09688)."""
    if cluster_size < 1:
        raise ValueError(f"cluster_size={cluster_size} must be at least 1 slot")
    if coarse_size is not None and coarse_size <= cluster_size:
        raise ValueError(f"coarse_size={coarse_size} must be above cluster_size={cluster_size}")
    if iterations < 0:
        raise ValueError(f"iterations={iterations} must be at least 0")
    fine = DirectionClusters(cluster_size, iterations, seed)
    coarse = None if coarse_size is None else DirectionClusters(coarse_size, iterations, seed)
    return Policy("squeezed", Squeezed(fine, coarse, quantile, coarse_quantile, window, k))
