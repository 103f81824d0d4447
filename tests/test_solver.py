"""The solver against every combination."""

import ctypes
import itertools
import os
import platform
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize  # type: ignore[import-untyped]

from flyweight.search.solver import Solver

AXES, CHOICES = 5, 4


class Device:
    """Latency: a sum over axes, times products of neighbours for ``coupled``."""

    def __init__(self, rng: np.random.Generator, coupled: float) -> None:
        self.alone = np.sort(rng.random((AXES, CHOICES)) + 0.1, axis=1)
        self.coupled = coupled

    def __call__(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        taken = self.alone[np.arange(AXES), points]
        return taken.sum(1) + self.coupled * (taken[:, 1:] * taken[:, :-1]).sum(1)


def case(seed: int, coupled: float) -> tuple[Solver, Device, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    device = Device(rng, coupled)
    harms = -np.sort(-rng.random((AXES, CHOICES)), axis=1)  # the faster, the more harm
    harms[:, -1] = 0
    every = np.array(list(itertools.product(range(CHOICES), repeat=AXES)))
    return Solver(list(harms), device, [True] * AXES), device, every


STARTS = [np.full(AXES, CHOICES - 1), np.zeros(AXES, int)]


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.1, 1.0))
def test_where_latency_is_a_sum_the_answer_is_the_best_there_is(seed: int, share: float) -> None:
    solver, device, every = case(seed, 0.0)
    ms = device(every)
    limit = ms.min() + share * (ms.max() - ms.min())
    best = min(solver.harm(p) for p in every[ms <= limit])
    found = solver.solve(limit, STARTS)
    assert found is not None
    assert device(found[None])[0] <= limit
    assert solver.harm(found) == pytest.approx(best, abs=1e-3)


def sized(seed: int, coupled: float) -> tuple[Solver, Device, Any, NDArray[np.int64]]:
    """The same where sizes are limited: two of them, sums that latency says little of."""
    solver, device, every = case(seed, coupled)
    rng = np.random.default_rng(seed + 1)
    sizes = [np.sort(rng.random((AXES, CHOICES)) + 0.1, axis=1) for _ in range(2)]

    def of(points: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.stack([size[np.arange(AXES), points].sum(1) for size in sizes], 1)

    found = of(every)
    most = found.min(0) + rng.uniform(0.2, 0.6, 2) * (found.max(0) - found.min(0))

    def shares(points: NDArray[np.int64]) -> NDArray[np.float64]:
        return of(points) / most

    return Solver(solver.harms, device, solver.ordered, shares), device, shares, every


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.1, 1.0))
def test_all_limits_are_kept_at_the_least_harm(seed: int, share: float) -> None:
    solver, device, shares, every = sized(seed, 0.0)
    ms, within = device(every), (shares(every) <= 1).all(1)
    limit = ms.min() + share * (ms.max() - ms.min())
    best = min((solver.harm(p) for p in every[within & (ms <= limit)]), default=None)
    found = solver.solve(limit, STARTS)
    assert (found is None) == (best is None)
    if found is not None:
        assert device(found[None])[0] <= limit
        assert (shares(found[None]) <= 1).all()
        assert solver.harm(found) == pytest.approx(best, abs=1e-3)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_fastest_is_within_the_further_limits(seed: int) -> None:
    solver, device, _, every = sized(seed, 0.0)
    alone = device.alone

    def large_when_fast(points: NDArray[np.int64]) -> NDArray[np.float64]:
        sizes = (alone.max() - alone)[np.arange(AXES), points].sum(1)
        return np.stack([sizes / most], 1)

    most = float(np.median((alone.max() - alone)[np.arange(AXES), every].sum(1)))
    solver.shares = large_when_fast
    ms, within = device(every), large_when_fast(every)[:, 0] <= 1
    assert device(every).min() < ms[within].min()
    fastest = solver.fastest(STARTS)
    assert fastest is not None
    assert solver.latency(fastest[None])[0] == pytest.approx(ms[within].min(), rel=1e-4)
    most = 1e-9
    assert solver.fastest(STARTS) is None
    assert solver.solve(ms.max(), STARTS) is None


def test_where_choices_act_together_it_is_nearly_the_best() -> None:
    beaten = []
    for seed in range(15):
        solver, device, every = case(seed, 1.0)
        ms = device(every)
        limit = ms.min() + 0.4 * (ms.max() - ms.min())
        found = solver.solve(limit, STARTS)
        assert found is not None
        assert device(found[None])[0] <= limit
        harms = np.array([solver.harm(p) for p in every[ms <= limit]])
        beaten.append((harms < solver.harm(found) - 1e-9).sum() / len(every))
    assert np.mean(beaten) < 0.005


class Precisions:
    """Latency of a chain of layers, each in int8 (0) or fp32 (1): half in int8, and a conversion
    wherever the precision changes. What one switch brings says little of what several do."""

    def __init__(self, rng: np.random.Generator, layers: int) -> None:
        self.alone, self.conversion = rng.uniform(0.2, 1, layers), rng.uniform(0.02, 0.3)

    def __call__(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        chain = np.pad(points, ((0, 0), (1, 1)), constant_values=1)
        changes = (chain[:, 1:] != chain[:, :-1]).sum(1)
        taken: NDArray[np.float64] = np.where(points, self.alone, self.alone / 2).sum(1)
        return taken + self.conversion * changes


def test_where_precisions_act_together_it_is_nearly_the_best() -> None:
    layers, beaten = 8, []
    every = np.array(list(itertools.product(range(2), repeat=layers)))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        device = Precisions(rng, layers)
        harms = [np.array([harm, 0.0]) for harm in rng.uniform(0.01, 1, layers)]
        solver = Solver(harms, device, [False] * layers)
        ms = device(every)
        limit = ms.min() + 0.5 * (ms.max() - ms.min())
        found = solver.solve(limit, [np.ones(layers, int), np.zeros(layers, int)])
        assert found is not None
        assert device(found[None])[0] <= limit
        known = np.array([solver.harm(p) for p in every[ms <= limit]])
        beaten.append((known < solver.harm(found) - 1e-9).sum() / len(every))
    assert np.mean(beaten) < 0.005  # 0.013 where a step may switch as many as it likes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="C's stdout is no variable")
def test_nothing_that_c_code_prints_is_heard(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    libc, milp = ctypes.CDLL(None), optimize.milp

    def loud(*args: Any, **settings: Any) -> Any:
        libc.puts(b"of C")
        os.write(1, b"of another thread\n")
        return milp(*args, **settings)

    monkeypatch.setattr(optimize, "milp", loud)
    solver, device, every = case(3, 1.0)
    assert solver.solve(device(every).mean(), STARTS) is not None
    libc.puts(b"afterwards")
    libc.fflush(None)
    heard = capfd.readouterr().out
    assert "of another thread" in heard
    assert "afterwards" in heard
    assert "of C" not in heard


def test_a_limit_out_of_reach_has_no_answer() -> None:
    solver, device, every = case(3, 1.0)
    assert solver.solve(0.99 * device(every).min(), STARTS) is None


def test_what_is_impossible_is_never_the_answer() -> None:
    solver, device, every = case(5, 0.5)
    best: Any = solver.solve(device(every).mean(), STARTS)
    forbidden = best.copy()

    def latency(points: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where((points == forbidden).all(1), np.inf, device(points))

    found = Solver(solver.harms, latency, solver.ordered).solve(device(every).mean(), STARTS)
    assert found is not None
    assert (found != forbidden).any()


def test_the_fastest_is_not_the_smallest_where_small_is_slow() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        alone = rng.uniform(0.5, 1.0, (AXES, CHOICES))  # in no order

        def latency(points: NDArray[np.int64], alone: NDArray[np.float64] = alone) -> Any:
            return alone[np.arange(AXES), points].sum(1)

        solver = Solver([np.zeros(CHOICES)] * AXES, latency, [True] * AXES)
        fastest = solver.fastest([np.zeros(AXES, int)])
        assert fastest is not None
        assert solver.latency(fastest[None])[0] == pytest.approx(alone.min(1).sum())
