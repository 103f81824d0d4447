"""The places at the next rung: how many of those at a rung go on, and who is first."""

import math
from collections.abc import Iterable

import numpy as np
from moocore import hypervolume

from .layers import Layers
from .pareto import Point, climbers, front

LEAST = 1e-6  # loss, and milliseconds, below which none is better than another


class Places:
    """The results of one rung by trial, and who went on from it. One in ``reduction`` has a place.

    Asynchronous successive halving (Li et al. 2020, "A system for massively parallel hyperparameter
    tuning") by non-dominated rank.
    """

    def __init__(self, reduction: float) -> None:
        self._reduction = reduction
        self._points: dict[int, Point] = {}
        self._layers = Layers()
        self._went: set[int] = set()
        self._took: set[int] = set()  # a place, of those

    def add(self, number: int, point: Point) -> None:
        """A result that others are compared with."""
        self._points[number] = point
        self._layers.add(number, point)

    def drop(self, number: int) -> None:
        """The trial failed, or does not compete: its place goes to another, and it beats nobody."""
        self._took.discard(number)
        self._went.discard(number)
        if self._points.pop(number, None):
            self._layers.remove(number)

    def best(self) -> set[int]:
        """Who is among the best 1 / ``reduction``; see ``climbers``."""
        return climbers(self._points, self._layers, self._reduction)

    def ahead(self, behind: int = 0) -> list[int]:
        """Who may have a place: those on the front, and where that has fewer than there are places,
        on the next ones. behind: so many fronts more."""
        out: list[int] = []
        for layer in self._layers:
            if len(out) >= self._all:
                if behind == 0:
                    break
                behind -= 1
            out += layer
        return out

    def free(self) -> int:
        """How many places nobody has."""
        return self._all - self.taken

    @property
    def _all(self) -> int:
        return math.ceil(len(self._points) / self._reduction)

    @property
    def taken(self) -> int:
        return len(self._took)

    def goes(self, number: int, takes_place: bool) -> None:
        """The trial goes on."""
        self._went.add(number)
        if takes_place:
            self._took.add(number)

    def by_gain(self, numbers: Iterable[int]) -> list[int]:
        """Some of the trials, by what they add to those that went on: the hypervolume in
        logarithms of loss and latency, up to one e-fold beyond the worst; of equals the first given
        first."""
        went = [_logs(self._points[number]) for number in self._went]
        some = {number: _logs(self._points[number]) for number in numbers}
        worst = np.max([*went, *some.values()], axis=0, initial=-math.inf) + 1

        def volume(points: list[Point]) -> float:
            return float(hypervolume(np.array(points), ref=worst)) if points else 0.0

        went = [went[i] for i in front(went)]  # the rest add nothing
        known = volume(went)
        gains = {number: volume([*went, at]) - known for number, at in some.items()}
        return sorted(gains, key=lambda number: -gains[number])


def _logs(point: Point) -> Point:
    loss, latency_ms = point
    return math.log(max(loss, LEAST)), math.log(max(latency_ms, LEAST))
