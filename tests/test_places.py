"""The places at the next rung."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.search.pareto import front
from flyweight.search.places import Places

POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 1)), min_size=1, max_size=30)


@given(POINTS, st.sampled_from([1.0, 2.0, 4.0]))
def test_ahead_are_whole_fronts_that_fill_the_places(
    points: list[tuple[float, float]], reduction: float
) -> None:
    places = Places(reduction)
    for number, point in enumerate(points):
        places.add(number, point)
    best = places.best()
    assert len(best) == places.free() == math.ceil(len(points) / reduction)
    assert best <= set(places.ahead())
    assert set(front(points)) <= set(places.ahead())
    left, filled = list(range(len(points))), set[int]()
    while len(filled) < len(best):
        on = {left[i] for i in front([points[i] for i in left])}
        filled |= on
        left = [i for i in left if i not in on]
    assert filled == set(places.ahead())


def test_a_place_is_taken_and_given_up() -> None:
    places = Places(4.0)
    for number in range(5):
        places.add(number, (1.0 - number / 10, 0.1 + number / 10))
    assert (places.free(), places.taken) == (2, 0)
    places.goes(0, True)
    places.goes(4, False)  # trained no further
    assert (places.free(), places.taken) == (1, 1)
    places.drop(0)
    assert (places.free(), places.taken) == (1, 0)  # of four results
    assert 0 not in places.ahead()


def area(points: list[tuple[float, float]], ref: tuple[float, float]) -> float:
    """What ``points`` dominate up to ``ref``, by strips of latency."""
    at = sorted({y for _, y in points if y < ref[1]} | {ref[1]})
    strips = ((low, min((x for x, y in points if y <= low), default=ref[0])) for low in at[:-1])
    return sum(
        (high - low) * max(0.0, ref[0] - x) for (low, x), high in zip(strips, at[1:], strict=True)
    )


@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(0.1, 1)), min_size=2, max_size=12))
def test_who_adds_most_is_first(points: list[tuple[float, float]]) -> None:
    places = Places(4.0)
    for number, point in enumerate(points):
        places.add(number, point)
    went = range(0, len(points), 3)
    for number in went:
        places.goes(number, True)
    found = places.by_gain(range(len(points)))
    assert sorted(found) == list(range(len(points)))
    logs = [(math.log(x), math.log(y)) for x, y in points]
    ref = max(x for x, _ in logs) + 1, max(y for _, y in logs) + 1
    gains = [area([*(logs[i] for i in went), logs[n]], ref) for n in found]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(gains))


def test_of_two_as_fast_the_one_that_loses_less_adds_more() -> None:
    places = Places(4.0)
    for number, point in enumerate([(0.027, 0.231), (0.027, 0.211), (0.051, 0.209)]):
        places.add(number, point)
    places.goes(0, True)
    assert places.by_gain([2, 1]) == [1, 2]


@pytest.mark.parametrize("reduction", [1.0, 3.0])
def test_without_results_nobody_is_ahead(reduction: float) -> None:
    places = Places(reduction)
    assert places.best() == set()
    assert (places.ahead(), places.free()) == ([], 0)
