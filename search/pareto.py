"""Non-dominated sorting, and the rule by which trials climb."""

import math
from collections.abc import Sequence

Point = tuple[float, float]  # (loss, latency), both to be small


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


def layers(points: Sequence[Point]) -> list[list[int]]:
    """The points peeled front by front (Deb et al. 2002, NSGA-II, sec. III-A)."""
    left = list(range(len(points)))
    out = []
    while left:
        peel = [left[i] for i in front([points[i] for i in left])]
        out.append(peel)
        gone = set(peel)
        left = [i for i in left if i not in gone]
    return out


def spread_order(points: Sequence[Point], chosen: list[int]) -> list[int]:
    """``chosen`` from the ends inwards, each next one farthest along latency from those before."""
    left = sorted(chosen, key=lambda i: points[i])
    out: list[int] = []
    while left:
        if not out:
            pick = min(left, key=lambda i: points[i][0])  # the most accurate is always first
        else:
            pick = max(left, key=lambda i: min(abs(points[i][1] - points[j][1]) for j in out))
        out.append(pick)
        left.remove(pick)
    return out


def climbs(earlier: Sequence[Point], new: Point, reduction: float) -> bool:
    """Whether a trial with result ``new`` goes on, given the results ``earlier`` at its rung.

    Asynchronous successive halving of the stopping kind (Li et al. 2020, "A system for massively
    parallel hyperparameter tuning") by non-dominated rank: it goes on if it is among the best
    ceil(n / reduction) of the n results so far, its own included; within a front those go first
    that spread evenly along latency.
    """
    points = [*earlier, new]
    places = math.ceil(len(points) / reduction)
    ahead = 0
    for layer in layers(points):
        if len(points) - 1 in layer:
            return ahead + spread_order(points, layer).index(len(points) - 1) < places
        ahead += len(layer)
    raise AssertionError("every point is in some layer")
