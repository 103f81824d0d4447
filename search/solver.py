"""Policies of the least predicted harm within limits: a table of harms, solved.

Harms of single choices are added up (as all methods that start from such a table do, e.g. HAWQ-V2,
Dong et al. 2020, sec. 3), latency is what the predictor says of the whole. Around a point latency,
and what else is limited, is taken to be a sum too, of what each single change there brings; then
the best choices are a multiple-choice knapsack, which HiGHS solves exactly. Its answer is the next
point, while that is better; a step goes no farther than the sum has proved to hold (a trust
region).
"""

import contextlib
import ctypes
import math
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
# What single changes of a point bring: axes [n], choices [n], costs [1 + n, 1 + limits], first
# those of the point itself.
Around = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
Shares = Callable[[NDArray[np.int64]], NDArray[np.float64]]  # points -> shares [n, limits]

STEPS = 30  # at most, from one start
REACH = 4  # choices that a width may move at first
SECONDS = 5.0  # for one knapsack at most; its best so far is taken then
TIME_OVER = 1  # in scipy's words
LEAST_ROOM = 2e-6  # as a share: HiGHS lets a constraint be missed by 1e-6


def _no_shares(points: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.zeros((len(points), 0))


@dataclass
class Solver:
    """harms: of each axis, of each of its choices. latency: of whole points. ordered: the axes
    whose choices are in order, so that a small step is a small change. shares: of whole points, of
    each further limit the share that they take, which is to be 1 at most."""

    harms: Sequence[NDArray[np.float64]]
    latency: Latency
    ordered: Sequence[bool]
    shares: Shares = _no_shares
    evaluations: int = field(default=0, init=False)
    cut: int = field(default=0, init=False)  # knapsacks that took all SECONDS

    def harm(self, point: Point) -> float:
        """The sum of the harms of its choices."""
        return float(sum(h[i] for h, i in zip(self.harms, point, strict=True)))

    def solve(self, limit_ms: float, starts: Sequence[Point]) -> Point | None:
        """The point of least harm within ``limit_ms`` and the further limits that is found from any
        of ``starts``; None if none is within."""
        ends = [self._from(np.array(start), limit_ms) for start in starts]
        found = [point for point, costs in ends if costs[0] <= limit_ms and _over(costs) == 0]
        return min(found, key=self.harm, default=None)

    def fastest(self, starts: Sequence[Point]) -> Point | None:
        """The point of least latency within the further limits that is found from any of
        ``starts``; None if none is within."""
        ends = [self._from(np.array(start), 0.0) for start in starts]
        found = [(float(costs[0]), point) for point, costs in ends if _over(costs) == 0]
        return min(found, key=lambda pair: pair[0], default=(math.inf, None))[1]

    def _from(self, point: Point, limit_ms: float) -> tuple[Point, NDArray[np.float64]]:
        reach, switches = REACH, sum(not ordered for ordered in self.ordered)
        costs, around = self._costs(point[None])[0], self._around(point, reach)
        for _ in range(STEPS):
            moved = self._knapsack(point, around, limit_ms, reach, switches)
            if (moved == point).all():  # nor is there anything better nearer, by the same sums
                break
            then = self._costs(moved[None])[0]
            if self._better(moved, then, point, costs, limit_ms):
                point, costs, around = moved, then, self._around(moved, reach)
            elif reach == 1 and switches <= 1:
                break
            else:
                reach, switches = max(1, reach // 2), switches // 2
        return point, costs

    def _better(
        self,
        a: Point,
        a_costs: NDArray[np.float64],
        b: Point,
        b_costs: NDArray[np.float64],
        limit_ms: float,
    ) -> bool:
        """Whether ``a`` is nearer to the limits, both being over one, or does less harm within
        them. The further limits come first: what is over them is no answer however fast it is."""
        for over, other, most in (
            (_over(a_costs), _over(b_costs), 0.0),
            (a_costs[0], b_costs[0], limit_ms),
        ):
            if over > most or other > most:
                return bool(over < other * (1 - 1e-9))
        return self.harm(a) < self.harm(b) - 1e-12

    def _costs(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        """[points, 1 + limits]: the latency, then the shares."""
        self.evaluations += len(points)
        return np.column_stack([self.latency(points), self.shares(points)])

    def _around(self, point: Point, reach: int) -> Around:
        near = [
            np.arange(max(0, at - reach), min(len(harms), at + reach + 1))
            if ordered else np.arange(len(harms))
            for harms, at, ordered in zip(self.harms, point, self.ordered, strict=True)
        ]  # fmt: skip
        owner, choice = np.repeat(np.arange(len(near)), list(map(len, near))), np.concatenate(near)
        rows = np.repeat(point[None], 1 + len(choice), 0)
        rows[np.arange(1, len(rows)), owner] = choice
        return owner, choice, self._costs(rows)

    def _knapsack(
        self, point: Point, around: Around, limit_ms: float, reach: int, switches: int
    ) -> Point:
        """The choices of least harm whose changes to the costs of ``point`` add up to what is
        within the limits, none farther than ``reach`` and at most ``switches`` of those that are in
        no order; where there are none, those that gain most where it is over."""
        owner, choice, costs = around
        unordered = ~np.array(self.ordered)[owner]
        near = (np.abs(choice - point[owner]) <= reach) | unordered
        owner, choice, unordered = owner[near], choice[near], unordered[near]
        changes = costs[1:][near] - costs[0]
        possible = np.isfinite(changes).all(1)
        changes = np.where(possible[:, None], changes, 0.0) / costs[0]
        limits = np.array([limit_ms, *np.ones(changes.shape[1] - 1)])
        room = (limits - costs[0]) / costs[0] - LEAST_ROOM
        one_each = optimize.LinearConstraint(
            sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner))))), 1, 1
        )
        switched = (choice != point[owner]) & unordered
        few = optimize.LinearConstraint(switched[None].astype(float), -np.inf, max(1, switches))
        harms = np.array([self.harms[j][i] for j, i in zip(owner, choice, strict=True)])
        bounds = optimize.Bounds(0, possible.astype(float))
        over = room < 0
        gained = over.copy()  # the further limits first, as in ``_better``
        gained[0] = not over[1:].any()
        every, rest = np.ones_like(over), ~(over | gained)
        for objective, kept in ((harms, every), (changes[:, gained].sum(1), rest)):
            constraints = [one_each, few]
            if kept.any():
                constraints.append(optimize.LinearConstraint(changes.T[kept], -np.inf, room[kept]))
            with _unheard():
                found = optimize.milp(
                    objective, integrality=np.ones(len(objective)), bounds=bounds,
                    constraints=constraints, options={"time_limit": SECONDS},
                )  # fmt: skip
            self.cut += found.status == TIME_OVER
            if found.x is not None:
                out = point.copy()
                chosen = found.x > 0.5
                out[owner[chosen]] = choice[chosen]
                return out
        return point


def _over(costs: NDArray[np.float64]) -> float:
    """How far costs are over the further limits, as shares of them."""
    return float(np.maximum(costs[1:] - 1, 0).sum())


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
