"""k-means against plain numpy, on ragged rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.policies import kmeans
from tests.recycled_jax.policies import kmeans_numpy
from tests.recycled_jax.policies.numpy_llama import best

SLOTS, CLUSTERS, HEADS, HEAD_DIM = 48, 12, 2, 5


@functools.partial(jax.jit, static_argnames=("clusters", "iterations", "seed", "spread", "block"))
def run(points, lengths, in_use, *, iterations=10, clusters=CLUSTERS, seed=0, spread=False, block=1024):
    """The start and the clusters it leads to."""
    heads = (points.shape[0], HEADS)
    valid = jnp.broadcast_to((jnp.arange(points.shape[2])[None] < lengths[:, None])[:, None], (*heads, points.shape[2]))
    start = (kmeans.spread_start if spread else kmeans.uniform_start)(points, valid, clusters=clusters, seed=seed)
    in_use = jnp.broadcast_to(in_use[:, None], heads)
    return start, kmeans.lloyd(points, valid, start, in_use, iterations=iterations, block=block)


lloyd = jax.jit(kmeans.lloyd, static_argnames="iterations")


def ragged_points(lengths, slots=SLOTS, seed=0):
    """Clumped, so that clusters mean something; NaN where no point is."""
    rng = np.random.default_rng(seed)
    points = np.full((len(lengths), HEADS, slots, HEAD_DIM), np.nan, np.float32)
    for row, length in enumerate(lengths):
        middles = rng.normal(size=(HEADS, 4, HEAD_DIM)) * 3
        points[row, :, :length] = middles[:, rng.integers(0, 4, length)] + rng.normal(size=(HEADS, length, HEAD_DIM))
    return points


rows = st.lists(st.tuples(st.integers(1, SLOTS), st.integers(1, CLUSTERS)), min_size=3, max_size=3)


@settings(max_examples=10)
@given(rows=rows, seed=st.integers(0, 10), spread=st.booleans())
def test_equals_numpy(rows, seed, spread):
    lengths = np.array([length for length, _ in rows])
    in_use = np.array([min(length, clusters) for length, clusters in rows])
    points = ragged_points(lengths, seed=seed)
    start, got = run(points, lengths, in_use, seed=0, spread=spread)
    draws = np.asarray(kmeans.draws(0, SLOTS), np.float64)
    for row, (length, clusters) in enumerate(zip(lengths, in_use, strict=True)):
        for head in range(HEADS):
            exact = points[row, head, :length].astype(np.float64)
            if spread:
                places = kmeans_numpy.spread(exact, draws[:clusters].tolist())
            else:
                places = best(draws[:length].tolist(), clusters)
            np.testing.assert_array_equal(start[row, head, :clusters], points[row, head, places])
            centroids, labels, _ = kmeans_numpy.lloyd(exact, exact[places], iterations=10)
            np.testing.assert_array_equal(got.labels[row, head], labels + [-1] * (SLOTS - length))
            np.testing.assert_allclose(got.centroids[row, head, :clusters], centroids, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(got.counts[row, head], np.bincount(labels, minlength=CLUSTERS))


def test_four_points_by_hand():
    # From 0 and 1 (the first two): {0}, {1, 10, 11} -> means 0, 22/3 -> {0, 1}, {10, 11} -> means 1/2, 21/2.
    points = jnp.zeros((1, 1, 4, HEAD_DIM)).at[0, 0, :, 0].set(jnp.array([0.0, 1, 10, 11]))
    every, two = jnp.ones((1, 1, 4), bool), jnp.full((1, 1), 2)
    got = lloyd(points, every, points[:, :, :2], two, iterations=10)
    assert got.labels.tolist() == [[[0, 0, 1, 1]]]
    assert got.centroids[0, 0, :, 0].tolist() == [0.5, 10.5]
    one_update = lloyd(points, every, points[:, :, :2], two, iterations=1)
    np.testing.assert_allclose(one_update.centroids[0, 0, :, 0], [0, 22 / 3], rtol=1e-6)
    assert one_update.labels.tolist() == [[[0, 0, 1, 1]]]  # under the centroids returned, not those before


def test_a_row_does_not_depend_on_its_batch_or_its_capacity():
    lengths = np.array([48, 9, 30])
    points = ragged_points(lengths)
    for spread in (False, True):
        _, together = run(points, lengths, np.array([12, 3, 7]), spread=spread)
        _, alone = run(points[1:2, :, :16], lengths[1:2], np.array([3]), clusters=4, spread=spread)
        np.testing.assert_array_equal(together.labels[1:2, :, :16], alone.labels)
        np.testing.assert_allclose(together.centroids[1:2, :, :3], alone.centroids[:, :, :3], rtol=1e-6)


def test_blocks_of_slots_add_up():
    lengths, in_use = np.array([48, 9, 30]), np.array([12, 3, 7])
    points = ragged_points(lengths)
    _, whole = run(points, lengths, in_use)
    _, blocks = run(points, lengths, in_use, block=20)
    np.testing.assert_array_equal(whole.labels, blocks.labels)
    np.testing.assert_array_equal(whole.counts, blocks.counts)
    np.testing.assert_allclose(whole.centroids, blocks.centroids, rtol=1e-5, atol=1e-6)


def test_as_many_clusters_as_points_separate_them_all():
    lengths = np.array([12, 5, 9])
    points = ragged_points(lengths)
    for spread in (False, True):
        _, got = run(points, lengths, lengths, spread=spread)
        for row, length in enumerate(lengths):
            for head in range(HEADS):
                assert sorted(got.labels[row, head, :length].tolist()) == list(range(length))
                own = got.centroids[row, head][got.labels[row, head, :length]]
                np.testing.assert_array_equal(own, points[row, head, :length])


def test_iterations_bring_the_points_nearer_to_their_centroids():
    lengths, in_use = np.array([48, 37, 30]), np.array([12, 3, 7])
    points = ragged_points(lengths)

    def distances(iterations):
        _, got = run(points, lengths, in_use, iterations=iterations)
        own = np.take_along_axis(np.asarray(got.centroids), np.maximum(got.labels, 0)[..., None], axis=2)
        return np.nansum((points - own) ** 2, axis=(2, 3))

    assert np.all(distances(10) < distances(0))


def test_spread_start_takes_the_far_point():
    # All but one point coincide: wherever the first lies, the second can only be the other place.
    points = jnp.zeros((1, HEADS, SLOTS, HEAD_DIM)).at[:, :, 17].set(1.0)
    points = jnp.broadcast_to(points, (3, *points.shape[1:]))
    for seed in (0, 1):
        start, _ = run(points, np.full(3, SLOTS), np.full(3, 2), seed=seed, spread=True)
        assert sorted(start[0, 0, :2, 0].tolist()) == [0.0, 1.0]


def test_seeds_differ_and_repeat():
    lengths, in_use = np.array([48, 37, 30]), np.array([12, 3, 7])
    points = ragged_points(lengths)
    first, _ = run(points, lengths, in_use, seed=0)
    again, _ = run(points, lengths, in_use, seed=0)
    other, _ = run(points, lengths, in_use, seed=1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[:, :, :3], other[:, :, :3])


def test_draws_are_uniform_and_stable():
    many = np.asarray(kmeans.draws(3, 2000))
    np.testing.assert_array_equal(many[:7], kmeans.draws(3, 7))
    assert many.min() >= 0 and many.max() < 1
    # standard error of the mean of 2000 uniform numbers: 0.0065
    assert abs(many.mean() - 0.5) < 4 * 0.0065
