"""Timing on a simulated clock: every figure is known beforehand."""

from collections import Counter
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.kernels import SimulatedClock, Timing, disturbed, time_sessions
from flyweight.kernels.timing import calls_within, visiting_order
from flyweight.kernels.twin import SimulatedSession

INPUTS = {"input": np.zeros((1, 2), np.float32)}
LATENCIES = st.lists(st.integers(1, 10**9).map(lambda ns: ns / 1e6), min_size=1, max_size=30)


def simulated(clock, *latencies_ms):
    return SimulatedSession(clock, latencies_ms, lambda inputs: inputs["input"])


def test_a_steady_model_takes_what_it_takes():
    clock = SimulatedClock()
    sessions = {"teacher": simulated(clock, 0.5), "small": simulated(clock, 0.2)}
    timings = time_sessions(sessions, INPUTS, clock=clock)
    assert timings["teacher"] == Timing((0.5,) * 15)
    assert timings["teacher"].median_ms / timings["small"].median_ms == pytest.approx(2.5)
    assert timings["small"].spread == 0


def test_the_figure_is_the_median_of_the_minima():
    # sizing the visit takes the first three; then each visit is a warm-up and two calls
    clock = SimulatedClock()
    session = simulated(clock, 9, 3, 5, 9, 7, 8, 9, 1, 2)
    timing = time_sessions({"m": session}, INPUTS, rounds=5, repeats=2, clock=clock)["m"]
    assert timing.rounds_ms == (7, 1, 3, 7, 1)
    assert (timing.min_ms, timing.median_ms, timing.max_ms) == (1, 3, 7)


def test_warm_up_calls_do_not_count():
    clock = SimulatedClock()
    session = simulated(clock, 1, 1, 6, 6)  # two warm-ups are fast, the calls are slow
    timing = time_sessions({"m": session}, INPUTS, 4, 2, warmup=2, clock=clock)["m"]
    assert timing.rounds_ms == (6, 6, 6, 6)


@given(LATENCIES, st.integers(1, 6), st.integers(1, 5), st.integers(0, 2))
def test_against_a_slow_reference(latencies_ms, rounds, repeats, warmup):
    clock = SimulatedClock()
    session = simulated(clock, *latencies_ms)
    found = time_sessions(
        {"m": session}, INPUTS, rounds, repeats, warmup, visit_ms=1e12, clock=clock
    )["m"]
    calls = warmup + min(3, repeats)  # those that size the visits
    minima = []
    for _ in range(rounds):
        taken = [latencies_ms[(calls + i) % len(latencies_ms)] for i in range(warmup + repeats)]
        minima.append(min(taken[warmup:]))
        calls += warmup + repeats
    assert found.rounds_ms == pytest.approx(minima, abs=1e-9)
    assert found.median_ms == pytest.approx(median(minima))
    assert session.calls == calls


def test_rounds_are_interleaved():
    visits = []

    class Watched(SimulatedSession):
        def run(self, inputs):
            if not visits or visits[-1] is not self:
                visits.append(self)
            return super().run(inputs)

    clock = SimulatedClock()
    names = "abcd"
    sessions = {name: Watched(clock, (1,), lambda inputs: inputs["input"]) for name in names}
    time_sessions(sessions, INPUTS, rounds=4, clock=clock)
    label = {id(session): name for name, session in sessions.items()}
    seen = "".join(label[id(session)] for session in visits)
    assert seen == "abcd" + "abdc" + "bcad" + "cdba" + "dacb"


@given(st.integers(2, 13))
def test_the_order_is_balanced(sessions):
    rounds = sessions if sessions % 2 == 0 else 2 * sessions
    orders = [visiting_order(sessions, round_) for round_ in range(rounds)]
    assert all(sorted(order) == list(range(sessions)) for order in orders)
    places = Counter((place, who) for order in orders for place, who in enumerate(order))
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert set(places.values()) == {rounds // sessions}
    assert len(pairs) == sessions * (sessions - 1)
    assert set(pairs.values()) == {rounds // sessions}


@pytest.mark.parametrize(
    ("call_ms", "calls"), [(0.01, 20), (2.5, 20), (5, 10), (12.6, 3), (1000, 3), (0, 20)]
)
def test_a_slow_model_is_called_less_often(call_ms, calls):
    assert calls_within(50, call_ms, repeats=20) == calls
    clock = SimulatedClock()
    session = simulated(clock, call_ms)
    time_sessions({"m": session}, INPUTS, rounds=6, clock=clock)
    assert session.calls == 4 + 6 * (1 + calls)


@pytest.mark.parametrize(("call_ms", "rounds"), [(1, 15), (100, 15), (250, 11), (1000, 5)])
def test_slow_models_are_timed_in_fewer_rounds(call_ms, rounds):
    clock = SimulatedClock()
    sessions = {name: simulated(clock, call_ms) for name in "abc"}
    timings = time_sessions(sessions, INPUTS, most_ms=33_000, clock=clock)
    assert {len(timing.rounds_ms) for timing in timings.values()} == {rounds}
    assert clock() <= max(33_000, 5 * 3 * 4 * call_ms) * 1e6 + 3 * 4 * call_ms * 1e6


def test_fewer_rounds_than_five_stay_what_they_are():
    clock = SimulatedClock()
    timings = time_sessions(
        {"m": simulated(clock, 1000)}, INPUTS, rounds=2, most_ms=1.0, clock=clock
    )
    assert len(timings["m"].rounds_ms) == 2


@given(st.floats(0.1, 1e3), st.floats(1e-3, 1e4), st.integers(1, 50))
def test_calls_stay_within_the_budget_and_the_bounds(visit_ms, call_ms, repeats):
    calls = calls_within(visit_ms, call_ms, repeats)
    assert min(3, repeats) <= calls <= repeats
    assert calls * call_ms <= visit_ms * (1 + 1e-9) or calls == min(3, repeats)


def test_spread_is_the_relative_inter_quartile_range():
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(2 / 3)
    assert Timing((2.0,)).spread == 0
    assert Timing((1.0,) * 12 + (100.0,) * 3).spread == 0


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.01, 100))
def test_figures_are_ordered_and_scale(rounds_ms, factor):
    timing, scaled = Timing(tuple(rounds_ms)), Timing(tuple(factor * ms for ms in rounds_ms))
    assert timing.min_ms <= timing.median_ms <= timing.max_ms
    assert scaled.median_ms == pytest.approx(factor * timing.median_ms)
    assert scaled.spread == pytest.approx(timing.spread, abs=1e-9)


def test_the_teacher_is_the_sentinel():
    calm, wild = Timing((1.0, 1.0, 1.0, 1.01)), Timing((1.0, 2.0, 3.0, 4.0))
    assert not disturbed({"teacher": calm, "a": wild})
    assert disturbed({"teacher": wild, "a": calm})
    assert disturbed({"a": wild})
    assert not disturbed({})


def test_waiting_for_the_cpu_disturbs_even_when_rounds_agree():
    wall, cpu = SimulatedClock(), SimulatedClock()

    class Preempted(SimulatedSession):
        def run(self, inputs):
            cpu.advance_ms(7)
            return super().run(inputs)

    sessions = {
        "teacher": Preempted(wall, (14, 16), lambda inputs: inputs["input"]),
        "small": Preempted(wall, (7, 8), lambda inputs: inputs["input"]),
    }
    timings = time_sessions(sessions, INPUTS, clock=wall, cpu_clock=cpu)
    assert timings["teacher"].spread == 0
    assert timings["teacher"].waiting == pytest.approx(0.5)
    assert timings["small"].waiting == 0
    assert disturbed(timings)
    assert not disturbed(timings, most_waiting=1)


def test_a_cpu_clock_that_is_too_coarse_says_nothing():
    clock = SimulatedClock()
    timings = time_sessions(
        {"m": simulated(clock, 1)}, INPUTS, clock=clock, cpu_clock=SimulatedClock()
    )
    assert timings["m"].waiting == 0


def test_nothing_to_time():
    assert time_sessions({}, INPUTS) == {}


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"repeats": 0}, {"warmup": -1}])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="must hold, but got"):
        time_sessions({}, INPUTS, **wrong)
