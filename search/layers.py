"""Non-dominated sorting, kept up to date as points come and go."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from .pareto import Point

_Step = tuple[float, float, int, int]  # latency, loss, how many came before, who


class Layers:
    """Points peeled front by front (Deb et al. 2002, NSGA-II, sec. III-A).

    A front is a stair, down in loss as latency rises. What a new point dominates there stands side
    by side; it makes room, and does the same to the next front (Buzdalov et al. 2015, "Fast
    implementation of the steady-state NSGA-II algorithm for two dimensions"). One that goes lets
    those up that nobody else dominates.
    """

    def __init__(self) -> None:
        self._fronts: list[list[_Step]] = []
        self._steps: dict[int, _Step] = {}
        self._came = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Who is on each front, by ascending latency; of equals the first to come is first."""
        return ([who for _, _, _, who in front] for front in self._fronts)

    def add(self, who: int, point: Point) -> None:
        loss, latency = point
        step = self._steps[who] = latency, loss, self._came, who
        self._came += 1
        at, moved = self._front_of(step), [step]
        while moved:
            if at == len(self._fronts):
                self._fronts.append([])
            front = self._fronts[at]
            begin = bisect_left(front, moved[0])
            end = max(begin, bisect_right(front, -moved[-1][1], key=_gain))
            front[begin:end], moved = moved, front[begin:end]
            at += 1

    def remove(self, who: int) -> None:
        step = self._steps.pop(who)
        at = self._front_of(step)
        begin = bisect_left(self._fronts[at], step)
        end = begin + 1
        while begin < end:  # what leaves the front
            front = self._fronts[at]
            below = self._fronts[at + 1] if at + 1 < len(self._fronts) else []
            first = bisect_right(below, _gain(front[begin - 1]), key=_gain) if begin else 0
            last = bisect_left(below, front[end]) if end < len(front) else len(below)
            front[begin:end] = below[first:last]
            begin, end, at = first, last, at + 1
        if not self._fronts[-1]:
            self._fronts.pop()

    def _front_of(self, step: _Step) -> int:
        """The first on which nothing dominates ``step``."""

        def free(front: list[_Step]) -> bool:
            at = bisect_left(front, step[:2])
            return at == 0 or front[at - 1][1] > step[1]

        return bisect_left(self._fronts, True, key=free)


def _gain(step: _Step) -> float:
    """Ascends along a front."""
    return -step[1]
