"""k-means over keys: Euclidean Lloyd, seeded, for ragged rows in arrays of static shape.

Points are `[batch, kv_heads, slots, head_dim]` with a mask of those that count, and rows have their own number of
clusters within a static maximum. Nothing depends on the number of padded slots or spare clusters, nor on the other
rows, so a row gets the same clusters in any batch and with any capacity.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Clusters:
    """A partition of points. A cluster with `counts` 0 is empty, or a spare one: its centroid means nothing."""

    centroids: Float[Array, "*layers batch kv_heads clusters head_dim"]  # float32
    counts: Int[Array, "*layers batch kv_heads clusters"]  # points in each
    labels: Int[Array, "*layers batch kv_heads slots"]  # the cluster of each point; -1 for a slot that is none


def draws(seed: int, count: int) -> Float[Array, " count"]:
    """`count` numbers, uniform in [0, 1); the first ones do not depend on how many are asked for."""
    key = jax.random.key(seed)
    return jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(key, place)))(jnp.arange(count))


def uniform_start(
    points: Float[Array, "batch kv_heads slots head_dim"],
    valid: Bool[Array, "batch kv_heads slots"],
    *,
    clusters: int,
    seed: int,
) -> Float[Array, "batch kv_heads clusters head_dim"]:
    """First centroids: distinct points, each as likely as any other."""
    order = jnp.where(valid, draws(seed, points.shape[2])[None, None, :], -1.0)
    _, places = lax.top_k(order, min(clusters, points.shape[2]))
    chosen = jnp.take_along_axis(_only_valid(points, valid), places[..., None], axis=2)
    # no more clusters than slots can be in use, but the array may have room for them
    return jnp.pad(chosen, [(0, 0), (0, 0), (0, clusters - chosen.shape[2]), (0, 0)])


def spread_start(
    points: Float[Array, "batch kv_heads slots head_dim"],
    valid: Bool[Array, "batch kv_heads slots"],
    *,
    clusters: int,
    seed: int,
) -> Float[Array, "batch kv_heads clusters head_dim"]:
    """First centroids by k-means++ (Arthur and Vassilvitskii, 2007): the first is any point, each later one is drawn in
    proportion to the squared distance from the nearest centroid so far."""
    points = _only_valid(points, valid)

    def next_centroid(weights, draw):
        total = jnp.cumsum(weights, axis=-1)
        place = jnp.argmax(total > draw * total[..., -1:], axis=-1)
        chosen = jnp.take_along_axis(points, place[..., None, None], axis=2)
        # Not by the expanded square: a chosen point must come out at exactly 0, or it could be chosen again.
        squared = jnp.where(valid, jnp.sum((points - chosen) ** 2, axis=-1), 0)
        return squared, chosen

    numbers = draws(seed, clusters)
    squared, first = next_centroid(valid.astype(jnp.float32), numbers[0])

    def step(nearest, draw):
        squared, chosen = next_centroid(nearest, draw)
        return jnp.minimum(nearest, squared), chosen

    _, later = lax.scan(step, squared, numbers[1:])
    return jnp.concatenate([first, jnp.moveaxis(later[..., 0, :], 0, 2)], axis=2)


def lloyd(
    points: Float[Array, "batch kv_heads slots head_dim"],
    valid: Bool[Array, "batch kv_heads slots"],
    start: Float[Array, "batch kv_heads clusters head_dim"],
    in_use: Int[Array, "batch kv_heads"],
    *,
    iterations: int,
    block: int = 1024,
) -> Clusters:
    """At most `iterations` updates of the centroids from `start`, of which each head uses the first `in_use`.

    A centroid is the mean of the points nearest to it (ties: to the lower number); without any it stays where it is.
    Labels are those under the returned centroids. Stops early once nothing moves in any row. Distances to all centroids
    exist for `block` slots at a time: the full matrix would be the largest array of a long prompt.
    """
    points = _only_valid(points, valid)
    usable = jnp.arange(start.shape[2])[None, None, :] < in_use[..., None]

    def update(carry):
        done, clusters, sums, _ = carry
        filled = (clusters.counts > 0)[..., None]
        means = sums / jnp.maximum(clusters.counts, 1)[..., None]
        after, sums = _assign(points, valid, jnp.where(filled, means, clusters.centroids), usable, block)
        return done + 1, after, sums, jnp.any(after.labels != clusters.labels)

    def moving(carry):
        done, _, _, moved = carry
        return moved & (done < iterations)

    with jax.named_scope("kmeans"):
        first, sums = _assign(points, valid, start, usable, block)
        _, clusters, _, _ = lax.while_loop(moving, update, (0, first, sums, jnp.bool(True)))
    return clusters


def _assign(
    points, valid, centroids, usable, block: int
) -> tuple[Clusters, Float[Array, "batch kv_heads clusters head_dim"]]:
    """The clusters around fixed centroids, and the sum of each one's points."""
    batch, kv_heads, slots, _ = points.shape
    block = min(slots, block)
    blocks = -(-slots // block)
    padding = blocks * block - slots
    norms = jnp.where(usable, jnp.sum(centroids**2, axis=-1), jnp.inf)

    def in_blocks(x, fill):
        widths = [(0, 0), (0, 0), (0, padding), *[(0, 0)] * (x.ndim - 3)]
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, kv_heads, blocks, block, *x.shape[3:]), 2, 0)

    def one_block(carry, inputs):
        sums, counts = carry
        here, real = inputs
        products = jnp.einsum("bksd,bkcd->bksc", here, centroids, precision=lax.Precision.HIGHEST)
        nearest = jnp.argmin(norms[:, :, None, :] - 2 * products, axis=-1)
        member = (nearest[..., None] == jnp.arange(centroids.shape[2])[None, None, None, :]) & real[..., None]
        sums += jnp.einsum("bksc,bksd->bkcd", member.astype(jnp.float32), here, precision=lax.Precision.HIGHEST)
        counts += jnp.sum(member, axis=2, dtype=jnp.int32)
        return (sums, counts), jnp.where(real, nearest, -1)

    nothing = jnp.zeros_like(centroids), jnp.zeros(centroids.shape[:3], jnp.int32)
    (sums, counts), labels = lax.scan(one_block, nothing, (in_blocks(points, 0), in_blocks(valid, False)))
    labels = jnp.moveaxis(labels, 0, 2).reshape(batch, kv_heads, blocks * block)[..., :slots]
    return Clusters(centroids, counts, labels), sums


def _only_valid(points, valid) -> Float[Array, "batch kv_heads slots head_dim"]:
    """In float32, zeros where there is no point: what lies there may be anything."""
    return jnp.where(valid[..., None], points.astype(jnp.float32), 0)
