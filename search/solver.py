"""Policies of the least predicted harm within a latency: a table of harms, solved.

Harms of single choices are added up (as all methods that start from such a table do, e.g. HAWQ-V2,
Dong et al. 2020, sec. 3), latency is what the predictor says of the whole. Around a point latency
is taken to be a sum too, of what each single change there brings; then the best choices are a
multiple-choice knapsack, which HiGHS solves exactly. Its answer is the next point, while that is
better; a step goes no farther than the sum has proved to hold (a trust region).
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse  # type: ignore[import-untyped]

Point = NDArray[np.int64]  # of every axis the index of its choice
Latency = Callable[[NDArray[np.int64]], NDArray[np.float64]]  # points [n, axes] -> ms [n]

STEPS = 30  # at most, from one start
REACH = 4  # choices that a width may move at first
SECONDS = 5.0  # for one knapsack at most; its best so far is taken then


@dataclass
class Solver:
    """harms: of each axis, of each of its choices. latency: of whole points. ordered: the axes
    whose choices are in order, so that a small step is a small change."""

    harms: Sequence[NDArray[np.float64]]
    latency: Latency
    ordered: Sequence[bool]
    evaluations: int = field(default=0, init=False)

    def harm(self, point: Point) -> float:
        """The sum of the harms of its choices."""
        return float(sum(h[i] for h, i in zip(self.harms, point, strict=True)))

    def solve(self, limit_ms: float, starts: Sequence[Point]) -> Point | None:
        """The point of least harm within ``limit_ms`` that is found from any of ``starts``; None if
        none is within."""
        ends = [self._from(np.array(start), limit_ms) for start in starts]
        found = [point for point, ms in ends if ms <= limit_ms]
        return min(found, key=self.harm, default=None)

    def fastest(self, starts: Sequence[Point]) -> float:
        """The least latency that is found from any of ``starts``."""
        return min(self._from(np.array(start), 0.0)[1] for start in starts)

    def _from(self, point: Point, limit_ms: float) -> tuple[Point, float]:
        reach, switches = REACH, sum(not ordered for ordered in self.ordered)
        ms = float(self._latency(point[None])[0])
        for _ in range(STEPS):
            moved = self._knapsack(point, (limit_ms - ms) / ms, reach, switches)
            then = float(self._latency(moved[None])[0])
            if self._better(moved, then, point, ms, limit_ms):
                point, ms = moved, then
            elif reach == 1 and switches <= 1:
                break
            else:
                reach, switches = max(1, reach // 2), switches // 2
        return point, ms

    def _better(self, a: Point, a_ms: float, b: Point, b_ms: float, limit_ms: float) -> bool:
        """Whether ``a`` is nearer to the limit, both being over it, or does less harm within it."""
        if a_ms > limit_ms or b_ms > limit_ms:
            return a_ms < b_ms * (1 - 1e-9)
        return self.harm(a) < self.harm(b) - 1e-12

    def _latency(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        self.evaluations += len(points)
        return self.latency(points)

    def _knapsack(self, point: Point, room: float, reach: int, switches: int) -> Point:
        """The choices of least harm whose changes to the latency of ``point`` add up to at most
        the share ``room`` of it, none farther than ``reach`` and at most ``switches`` of those
        that are in no order; where there are none, those that gain most."""
        near = [
            np.arange(max(0, at - reach), min(len(harms), at + reach + 1))
            if ordered else np.arange(len(harms))
            for harms, at, ordered in zip(self.harms, point, self.ordered, strict=True)
        ]  # fmt: skip
        owner, choice = np.repeat(np.arange(len(near)), list(map(len, near))), np.concatenate(near)
        rows = np.repeat(point[None], 1 + len(choice), 0)
        rows[np.arange(1, len(rows)), owner] = choice
        ms = self._latency(rows)
        changes = ms[1:] - ms[0]
        possible = np.isfinite(changes)
        changes = np.where(possible, changes, 0.0) / ms[0]
        one_each = optimize.LinearConstraint(
            sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner))))), 1, 1
        )
        # HiGHS lets a constraint be missed by 1e-6.
        within = optimize.LinearConstraint(changes[None], -np.inf, room - 2e-6)
        switched = (choice != point[owner]) & ~np.array(self.ordered)[owner]
        few = optimize.LinearConstraint(switched[None].astype(float), -np.inf, max(1, switches))
        harms = np.concatenate([h[n] for h, n in zip(self.harms, near, strict=True)])
        bounds = optimize.Bounds(0, possible.astype(float))
        for costs, constraints in ((harms, [one_each, few, within]), (changes, [one_each, few])):
            with _unheard():
                found = optimize.milp(
                    costs, integrality=np.ones(len(costs)), bounds=bounds, constraints=constraints,
                    options={"time_limit": SECONDS},
                )  # fmt: skip
            if found.x is not None:
                out = point.copy()
                chosen = found.x > 0.5
                out[owner[chosen]] = choice[chosen]
                return out
        return point


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Lets what C code prints go nowhere.

    HiGHS 1.12 (in scipy 1.17) prints a line of its debugging, whatever its options say, where a
    solution has to be repaired (HiGHS issue 2783): in 5 of 1,294 knapsacks, and without presolve
    too. File descriptor 1 stays as it is, for other threads print meanwhile.
    """
    streams = _c_streams()
    if streams is None:
        yield
        return
    stdout, heard, nowhere = streams
    stdout.value = nowhere
    try:
        yield
    finally:
        stdout.value = heard


@cache
def _c_streams() -> tuple[Any, int | None, int] | None:
    """C's variable ``stdout``, what it is, and a stream that goes nowhere; None where it is not
    known to be a variable: glibc's manual says that it may be set ("Standard Streams")."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    nowhere = libc.fopen(os.devnull.encode(), b"w")
    stdout = ctypes.c_void_p.in_dll(libc, "stdout")
    return (stdout, stdout.value, nowhere) if nowhere else None
