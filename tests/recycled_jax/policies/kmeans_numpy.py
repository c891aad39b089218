"""k-means in plain numpy, its random choices handed in."""

from collections.abc import Sequence

import numpy as np


def nearest(points: np.ndarray, centroids: np.ndarray) -> list[int]:
    """Number of each point's closest centroid, ties to the lower."""
    return [int(np.argmin(np.sum((centroids - point[None, :]) ** 2, axis=1))) for point in points]


def margin(points: np.ndarray, centroids: np.ndarray) -> float:
    """By how much the closest centroid is closer than the second, in squares, for the point where it is least.

    In the lowest layer, keys of one token at equally spaced positions lie equally far apart: such ties are exact, and
    rounding decides them.
    """
    if len(centroids) == 1:
        return np.inf
    squares = [sorted(np.sum((centroids - point[None, :]) ** 2, axis=1))[:2] for point in points]
    return min(second - first for first, second in squares)


def lloyd(points: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, list[int], float]:
    """Centroids after at most `iterations` updates from `start`, the label of every point under them, and the least
    margin that any label had on the way.

    A centroid without members stays where it was.
    """
    centroids, labels = np.array(start, np.float64), nearest(points, start)
    least = margin(points, start)
    for _ in range(iterations):
        for number in range(len(centroids)):
            members = [point for point, label in zip(points, labels, strict=True) if label == number]
            if members:
                centroids[number] = np.mean(members, axis=0)
        before, labels = labels, nearest(points, centroids)
        least = min(least, margin(points, centroids))
        if labels == before:
            break
    return centroids, labels, least


def spread(points: np.ndarray, draws: Sequence[float]) -> list[int]:
    """k-means++: places of the first centroids, one for each draw in [0, 1).

    The first is uniform; each later one is drawn in proportion to the squared distance from the nearest so far.
    """
    places = [int(draws[0] * len(points))]
    for draw in draws[1:]:
        squared = [min(np.sum((point - points[place]) ** 2) for place in places) for point in points]
        total = np.cumsum(squared)
        places.append(int(np.argmax(total > draw * total[-1])))
    return places
