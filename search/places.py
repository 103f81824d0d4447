"""The places at the next rung: how many of those at a rung go on, and who is first."""

import math
from collections.abc import Iterable

import numpy as np
from moocore import hypervolume

from .pareto import Point, climbers, front, layers

LEAST = 1e-6  # loss, and milliseconds, below which none is better than another


class Places:
    """The results of one rung by trial, and who went on from it. One in ``reduction`` has a place.

    Asynchronous successive halving (Li et al. 2020, "A system for massively parallel hyperparameter
    tuning") by non-dominated rank. ahead: who may have one: those on the front, and where that has
    fewer than there are places, on the next ones.
    """

    def __init__(self, reduction: float) -> None:
        self._reduction = reduction
        self._points: dict[int, Point] = {}
        self._took: set[int] = set()
        self._went: set[int] = set()  # with a place or without
        self._ranked: dict[int, Point] = {}  # with the newest
        self.ahead: list[int] = []

    def __contains__(self, number: int) -> bool:
        return number in self._points

    def add(self, number: int, point: Point) -> None:
        """A result that others are compared with. ``rank`` is called after it."""
        self._points[number] = point

    def drop(self, number: int) -> None:
        """The trial failed: its place goes to another, and it beats nobody."""
        self._took.discard(number)
        self._went.discard(number)
        if self._points.pop(number, None):
            self.rank()

    def rank(self, newest: dict[int, Point] | None = None) -> set[int]:
        """Who is among the best 1 / ``reduction`` of the results and the ``newest``; see
        ``climbers``."""
        points = self._ranked = self._points | (newest or {})
        numbers, values = list(points), list(points.values())
        ranked = layers(values)
        best = climbers(values, ranked, self._reduction)
        self.ahead = [numbers[i] for layer in ranked if best.intersection(layer) for i in layer]
        return {numbers[i] for i in best}

    def free(self, more: int = 0) -> int:
        """How many places nobody has, by the number of results and ``more``."""
        return math.ceil((len(self._points) + more) / self._reduction) - self.taken

    @property
    def taken(self) -> int:
        """By those that compete: what is over a limit that was changed has none."""
        return len(self._took & self._points.keys())

    def goes(self, number: int, takes_place: bool) -> None:
        """The trial goes on."""
        self._went.add(number)
        if takes_place:
            self._took.add(number)

    def by_gain(self, numbers: Iterable[int]) -> list[int]:
        """Trials that were ranked, by what they add to those that went on: the hypervolume in
        logarithms of loss and latency, up to one e-fold beyond the worst; of equals the first given
        first."""
        went = [_logs(self._ranked[number]) for number in self._went if number in self._ranked]
        some = {number: _logs(self._ranked[number]) for number in numbers}
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
