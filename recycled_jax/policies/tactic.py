"""Tactic: as many slots as hold a share of the attention, found by clusters of keys and a fitted tail."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache, gather_attention, select_tokens
from pallas_kernels.ops.gather_selection.xla import gather_positions
from pallas_kernels.ops.one_query import softmax_weights
from recycled_jax.frame import Attended, Axes, Here, Method
from recycled_jax.frame.method import selecting_trace
from recycled_jax.policies import kmeans
from recycled_jax.policies.policy import Policy
from recycled_jax.policies.top_p import mass_before

_UNRANKED = 2.0  # above any share of the attention


@struct.dataclass
class TacticState:
    """Each layer's clusters of keys.

    `clustered` counts the slots in them, the first ones; the later ones are attended anyway. `overflow` counts the
    slots left out for want of room in k, over steps and kv heads.
    """

    clusters: kmeans.Clusters  # with an axis of layers before the others
    places: Int[Array, "layers batch kv_heads capacity"]  # of each slot among those of its cluster, from 0
    clustered: Int[Array, "layers batch"]
    overflow: Int[Array, "layers batch"]


@dataclass(frozen=True)
class KeyClusters:
    """Euclidean k-means over the keys of a kv head, from a uniform start: one cluster for every `cluster_size` keys."""

    cluster_size: int
    iterations: int
    seed: int

    def __post_init__(self) -> None:
        if self.cluster_size < 1:
            raise ValueError(f"cluster_size={self.cluster_size} must be at least 1 key")
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} must be at least 0")

    def make(
        self, keys: Float[Array, "batch kv_heads capacity head_dim"], lengths: Int[Array, " batch"]
    ) -> tuple[kmeans.Clusters, Int[Array, "batch kv_heads capacity"]]:
        """The clusters of each row's first `lengths` keys, and each slot's place in its cluster, the earliest first."""
        heads, capacity = keys.shape[:2], keys.shape[2]
        valid = jnp.broadcast_to((jnp.arange(capacity)[None, :] < lengths[:, None])[:, None, :], (*heads, capacity))
        number = max(1, capacity // self.cluster_size)
        in_use = jnp.broadcast_to(jnp.maximum(lengths // self.cluster_size, 1)[:, None], heads)
        start = kmeans.uniform_start(keys, valid, clusters=number, seed=self.seed)
        clusters = kmeans.lloyd(keys, valid, start, in_use, iterations=self.iterations)
        labels = jnp.where(valid, clusters.labels, number)
        in_order = jnp.argsort(jnp.argsort(labels, axis=-1, stable=True), axis=-1)
        before = jnp.cumsum(clusters.counts, axis=-1) - clusters.counts
        places = in_order - jnp.take_along_axis(before, jnp.maximum(clusters.labels, 0), axis=-1)
        return clusters, jnp.where(valid, places, -1)


@dataclass(frozen=True)
class FittedTail:
    """The softmax weights of ranked slots, from few of them: 1 in `exact_one_in`, the first ranks, count exactly; for
    the rest a/x + b is fitted to the mean weights in two windows of half a percent around a tenth and six tenths of
    the ranks (x counts ranks from 1; a and b at least 0).

    The paper samples the first 1 to 2 percent and 2.5 percent in all; where its windows lie exactly is ours.
    """

    exact_one_in: int

    def __post_init__(self) -> None:
        if self.exact_one_in < 1:
            raise ValueError(f"exact_one_in={self.exact_one_in} must be at least 1 (1 evaluates every rank)")

    def samples(
        self, counts: Int[Array, " batch"], capacity: int
    ) -> tuple[Int[Array, "batch samples"], Bool[Array, "batch 3 samples"]]:
        """The ranks, from 0, to evaluate of each row's `counts`; and which of them belong to the first ranks, to the
        near and to the far window."""
        parts, places = [], []
        width = -(-counts // 200)
        for first, size, most in (
            (jnp.zeros_like(counts), -(-counts // self.exact_one_in), -(-capacity // self.exact_one_in)),
            (_window_start(counts // 10, width), width, -(-capacity // 200)),
            (_window_start(counts * 6 // 10, width), width, -(-capacity // 200)),
        ):
            offsets = jnp.arange(most)[None, :]
            ranks = first[:, None] + offsets
            places.append(jnp.minimum(ranks, capacity - 1))
            parts.append((offsets < size[:, None]) & (ranks < counts[:, None]))
        empty = [jnp.zeros_like(part) for part in parts]
        members = [jnp.concatenate([*empty[:i], part, *empty[i + 1 :]], axis=1) for i, part in enumerate(parts)]
        return jnp.concatenate(places, axis=1), jnp.stack(members, axis=1)

    def weights(
        self,
        logits: Float[Array, "batch kv_heads group samples"],
        ranks: Int[Array, "batch samples"],
        parts: Bool[Array, "batch 3 samples"],
        counts: Int[Array, " batch"],
        capacity: int,
    ) -> Float[Array, "batch kv_heads group capacity"]:
        """By rank; 0 past a row's `counts`."""
        sampled = jnp.any(parts, axis=1)[:, None, None, :]
        logits = jnp.where(sampled, logits, -jnp.inf)
        weights = jnp.exp(logits - jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min))

        def window(part):
            share = part / jnp.maximum(jnp.sum(part, axis=-1, keepdims=True), 1)
            place = jnp.sum(share * (ranks + 1), axis=-1)[:, None, None]
            return place, jnp.sum(share[:, None, None, :] * weights, axis=-1)

        (near, y1), (far, y2) = window(parts[:, 1]), window(parts[:, 2])
        # of less than three ranks the windows coincide: no slope
        apart = jnp.where(near < far, 1 / near - 1 / far, jnp.inf)
        slope = jnp.maximum((y1 - y2) / apart, 0)
        floor = jnp.maximum(y1 - slope / near, 0)
        x = jnp.arange(1, capacity + 1)[None, None, None, :]
        tail = slope[..., None] / x + floor[..., None]
        first = -(-capacity // self.exact_one_in)
        exact = jnp.pad(weights[..., :first], [(0, 0)] * 3 + [(0, capacity - first)])
        is_exact = x <= (-(-counts // self.exact_one_in))[:, None, None, None]
        return jnp.where(x <= counts[:, None, None, None], jnp.where(is_exact, exact, tail), 0)


@dataclass(frozen=True)
class Tactic(Method):
    """Every query head keeps the first slots, ranked by clusters, that by the estimate hold the share `p` of its
    attention to the clustered slots; the heads of a group attend the union.

    The slots since the last clustering are always attended; every `recluster` steps all are clustered anew. Rows of
    less than `exact_below` slots go by the exact attention to all their slots. Where a union has more than `k` slots,
    self stays, then the newest of those not clustered, then the union for a smaller p (ours).
    """

    clusters: KeyClusters
    tail: FittedTail
    p: float
    k: int
    recluster: int
    exact_below: int

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must be above 0 and at most 1")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1: the current token is always read")
        if self.recluster < 1:
            raise ValueError(f"recluster={self.recluster} must be at least 1 step")
        if self.exact_below < 1:
            raise ValueError(f"exact_below={self.exact_below} must be at least 1 slot (1: the estimate always)")

    @property
    def axes(self):
        scorer = f"clusters of {self.clusters.cluster_size} keys, fitted tail"
        return Axes(scorer, f"top-p(p={self.p}, k={self.k})", f"every-step; clusters anew every {self.recluster}")

    def begin(self, prefilled, *, implementation):
        cache, lengths = prefilled.cache, prefilled.prompts.lengths
        layers = jnp.arange(cache.layers)
        clusters, places = lax.map(lambda layer: self.clusters.make(cache.keys(layer), lengths), layers)
        per_row = (cache.layers, cache.batch)
        return TacticState(clusters, places, jnp.broadcast_to(lengths[None, :], per_row), jnp.zeros(per_row, jnp.int32))

    def attend(self, role, token, cache, state: TacticState, handed, here):
        assert cache is not None
        anew = here.step % self.recluster == 0
        with jax.named_scope("attention/cluster"):
            state = lax.cond(anew, lambda old: self._clustered_anew(old, cache, here), lambda old: old, state)
        with jax.named_scope("attention/select"):
            needed, scored = self._needed(token.q, cache, state, here)
            slots, length = jnp.arange(cache.capacity)[None, None, :], here.lengths[:, None, None]
            since = (slots >= state.clustered[here.layer][:, None, None]) & (length >= self.exact_below)
            always = ((slots == length - 1) | since) & (slots < length)
            # all of the attention is all slots, however the sums are rounded
            wanted = always | ((slots < length) if self.p == 1 else (needed < self.p))
            positions, left_out = capped(jnp.where(always, 1.0 + slots, -needed), wanted, k=self.k, here=here)
        with jax.named_scope("attention/selection"):
            output = gather_attention(token.q, cache, positions, **here.to_op)
        state = dataclasses.replace(state, overflow=state.overflow.at[here.layer].add(left_out))
        # every pass of the k-means reads all keys
        scored += jnp.where(anew, here.lengths * (self.clusters.iterations + 1.0), 0.0)
        return Attended(output, state, handed, selecting_trace(positions, scored, here), positions)

    def _clustered_anew(self, state: TacticState, cache: KVCache, here: Here) -> TacticState:
        """The layer's clusters of all slots, in active rows."""
        made = self.clusters.make(cache.keys(here.layer), here.lengths)

        def update(stack, new):
            rows = here.active.reshape(-1, *(1,) * (new.ndim - 1))
            return stack.at[here.layer].set(jnp.where(rows, new, stack[here.layer]))

        old = state.clusters, state.places, state.clustered
        clusters, places, clustered = jax.tree.map(update, old, (*made, here.lengths))
        return TacticState(clusters, places, clustered, state.overflow)

    def _needed(
        self, q: Float[Array, "batch query_heads head_dim"], cache: KVCache, state: TacticState, here: Here
    ) -> tuple[Float[Array, "batch kv_heads capacity"], Float[Array, " batch"]]:
        """The share of attention from which on a query head of the group keeps the slot: what it would rather attend
        holds less; above 1 for slots that are not ranked. And what finding out reads."""
        estimated, scored = self._by_estimate(q, cache, state, here)
        short = here.lengths < self.exact_below
        exact = lax.cond(jnp.any(short), lambda: self._by_attention(q, cache, here), lambda: jnp.zeros_like(estimated))
        needed = jnp.where(short[:, None, None], exact, estimated)
        return needed, jnp.where(short, here.lengths.astype(jnp.float32), scored)

    def _by_attention(
        self, q: Float[Array, "batch query_heads head_dim"], cache: KVCache, here: Here
    ) -> Float[Array, "batch kv_heads capacity"]:
        """For rows of less than `exact_below` slots; no others are looked at."""
        looked_at = min(self.exact_below, cache.capacity)
        visible = jnp.arange(looked_at)[None, None, :] < here.lengths[:, None, None]
        keys, _ = cache.block(here.layer, 0, looked_at)
        weights, total = softmax_weights(q, keys, visible, q.shape[-1] ** -0.5)
        before = mass_before((weights / total).reshape(cache.batch, -1, looked_at))
        needed = jnp.min(before.reshape(weights.shape), axis=2)
        return jnp.pad(needed, [(0, 0), (0, 0), (0, cache.capacity - looked_at)], constant_values=_UNRANKED)

    def _by_estimate(
        self, q: Float[Array, "batch query_heads head_dim"], cache: KVCache, state: TacticState, here: Here
    ) -> tuple[Float[Array, "batch kv_heads capacity"], Float[Array, " batch"]]:
        batch, heads, capacity, head_dim = cache.batch, cache.kv_heads, cache.capacity, cache.head_dim
        clusters, places = jax.tree.map(lambda x: x[here.layer], (state.clusters, state.places))
        clustered = state.clustered[here.layer]
        grouped = q.astype(jnp.float32).reshape(batch, heads, -1, head_dim)
        ranks = _ranks_by_cluster(grouped, clusters, places)
        samples, parts = self.tail.samples(clustered, capacity)

        slots = jnp.broadcast_to(jnp.arange(capacity)[None, None, None, :], ranks.shape)
        at_rank = jnp.put_along_axis(jnp.zeros_like(ranks), ranks, slots, axis=-1, inplace=False, mode="drop")
        sampled = jnp.take_along_axis(at_rank, samples[:, None, None, :], axis=-1)
        keys, _ = gather_positions(cache, here.layer, sampled.reshape(batch, heads, -1))
        keys = keys.astype(jnp.float32).reshape(*sampled.shape, head_dim)
        logits = jnp.einsum("bkgd,bkgsd->bkgs", grouped, keys, precision=lax.Precision.HIGHEST) * head_dim**-0.5
        weights = self.tail.weights(logits, samples, parts, clustered, capacity)
        before = jnp.cumsum(jnp.pad(weights[..., :-1], [(0, 0)] * 3 + [(1, 0)]), axis=-1)
        before /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        of_slot = jnp.take_along_axis(before, jnp.minimum(ranks, capacity - 1), axis=-1)
        needed = jnp.min(jnp.where(ranks < capacity, of_slot, _UNRANKED), axis=2)

        centroids = jnp.mean(jnp.sum(clusters.counts > 0, axis=-1), axis=-1)
        keys_read = jnp.sum(jnp.any(parts, axis=1), axis=-1) * grouped.shape[2]
        return needed, centroids + keys_read


def capped(
    strength: Float[Array, "batch kv_heads capacity"],
    wanted: Bool[Array, "batch kv_heads capacity"],
    *,
    k: int,
    here: Here,
) -> tuple[Int[Array, "batch kv_heads {k}"], Int[Array, " batch"]]:
    """The slots that are `wanted`, the `k` strongest where they are more, among equals the earlier ones; and how many
    are left out, sum over heads, 0 in rows that are not active. Those not wanted have to be the weakest."""
    chosen = select_tokens(strength, here.lengths, k=k, ordered=False, implementation=here.implementation)
    kept = (chosen >= 0) & jnp.take_along_axis(wanted, jnp.maximum(chosen, 0), axis=-1)
    left_out = jnp.sum(jnp.maximum(jnp.sum(wanted, axis=-1) - k, 0), axis=-1)
    return jnp.where(kept, chosen, -1), jnp.where(here.active, left_out, 0)


def _ranks_by_cluster(
    q: Float[Array, "batch kv_heads group head_dim"],
    clusters: kmeans.Clusters,
    places: Int[Array, "batch kv_heads capacity"],
) -> Int[Array, "batch kv_heads group capacity"]:
    """Clusters by the product of their centroid with the query, slots by their place in the cluster, from 0; the
    capacity for slots in none."""
    products = jnp.einsum("bkgd,bkcd->bkgc", q, clusters.centroids, precision=lax.Precision.HIGHEST)
    # an empty cluster may come anywhere: it takes no ranks
    order = jnp.argsort(-products, axis=-1, stable=True)
    counts = jnp.take_along_axis(clusters.counts[:, :, None, :], order, axis=-1)
    before = jnp.take_along_axis(jnp.cumsum(counts, axis=-1) - counts, jnp.argsort(order, axis=-1), axis=-1)
    labels = clusters.labels[:, :, None, :]
    ranks = jnp.take_along_axis(before, jnp.maximum(labels, 0), axis=-1) + places[:, :, None, :]
    return jnp.where(labels >= 0, ranks, labels.shape[-1])


def _window_start(middle: Int[Array, " batch"], width: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """The first rank, from 0, of a window around a rank that counts from 1."""
    return jnp.maximum(middle - (width - 1) // 2, 1) - 1


def tactic(
    k: int = 4096,
    p: float = 0.9,
    cluster_size: int = 16,
    iterations: int = 10,
    recluster: int = 2048,
    exact_one_in: int = 64,
    exact_below: int = 256,
    seed: int = 0,
) -> Policy:
    """Tactic: every query head attends as many slots as hold the share `p` of its attention, by clusters of keys and a
    fitted 1/x tail, at most `k` in a group; keys are clustered anew every `recluster` steps (Zhu et al., arXiv
    2502.12216)."""
    clusters = KeyClusters(cluster_size, iterations, seed)
    return Policy("tactic", Tactic(clusters, FittedTail(exact_one_in), p, k, recluster, exact_below))
