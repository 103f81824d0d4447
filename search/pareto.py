"""Non-dominated sorting, and the rule by which trials climb."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Point = tuple[float, float]  # (loss, latency), both to be small
Points = Mapping[int, Point] | Sequence[Point]
# The share of those that would be stopped by what others found that go on all the same. Only they
# can tell what a rung is worth (``correlation``): of the others, the bad are never seen again. It
# costs about this share of the work of each rung above the lowest. None of the EARLY trials does:
# a search no longer than that has too few for an estimate, and one may train for a fifth of it.
CHANCE, EARLY = 0.05, 100


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by ascending second coordinate."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    best = math.inf
    out: list[int] = []
    for i in order:
        if points[i][0] < best or (out and points[i] == points[out[-1]]):
            out.append(i)
            best = min(best, points[i][0])
    return out


def spread_order(points: Points, chosen: list[int], most: int | None = None) -> list[int]:
    """``chosen`` from the ends inwards, each next one farthest along latency from those before;
    the first ``most`` of them."""
    left = sorted(chosen, key=lambda i: points[i])
    at = np.array([points[i][1] for i in left])
    gap = np.full(len(left), np.inf)  # to the nearest that was picked
    out: list[int] = []
    pick = 0  # the most accurate is always first
    for _ in left[:most]:
        out.append(left[pick])
        gap = np.minimum(gap, np.abs(at - at[pick]))
        gap[pick] = -1.0
        pick = int(gap.argmax())
    return out


def climbers(points: Points, ranked: Iterable[list[int]], reduction: float) -> set[int]:
    """Which of the results ``points`` of a rung go on, by non-dominated rank: the best
    ceil(n / reduction) of the n; within a front those go first that spread evenly along latency.
    ranked: the ``Layers`` of the points."""
    out: set[int] = set()
    places = math.ceil(len(points) / reduction)
    for layer in ranked:
        left = places - len(out)
        if len(layer) >= left:
            return out | set(layer if len(layer) == left else spread_order(points, layer, left))
        out.update(layer)
    return out


def by_chance(seed: int, number: int, digest: str, rung: str) -> bool:
    """Whether trial ``number``, of the policy of ``digest``, goes on from ``rung`` whatever its
    rank: one in 1 / CHANCE, of all but the EARLY.

    It hangs on these alone: the same in whatever order results come, and after a resume.
    """
    if number < EARLY:
        return False
    drawn = hashlib.sha256(f"{seed}/{digest}/{rung}".encode()).digest()[:8]
    return int.from_bytes(drawn, "big") < CHANCE * 2**64
