"""Fronts and climbing, against brute force."""

import math

from hypothesis import given
from hypothesis import strategies as st

from flyweight.search.layers import Layers
from flyweight.search.pareto import (
    CHANCE,
    EARLY,
    by_chance,
    climbers,
    dominates,
    front,
    spread_order,
)

COORDINATE = st.integers(0, 6).map(float)  # few values: many ties
POINT = st.tuples(COORDINATE, COORDINATE)
POINTS = st.lists(POINT, max_size=14)


def brute_front(points: list[tuple[float, float]]) -> set[int]:
    return {
        i for i, p in enumerate(points)
        if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    }  # fmt: skip


@given(POINT, POINT)
def test_dominates(a: tuple[float, float], b: tuple[float, float]) -> None:
    assert dominates(a, b) == (a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1]))


@given(POINTS)
def test_front_is_what_no_other_dominates_by_latency(points: list[tuple[float, float]]) -> None:
    found = front(points)
    assert set(found) == brute_front(points)
    assert len(found) == len(set(found))
    assert [points[i][1] for i in found] == sorted(points[i][1] for i in found)


@given(POINTS.filter(bool))
def test_spread_order_begins_with_the_most_accurate_and_loses_none(
    points: list[tuple[float, float]],
) -> None:
    found = spread_order(points, list(range(len(points))))
    assert sorted(found) == list(range(len(points)))
    assert points[found[0]][0] == min(p[0] for p in points)
    for n in range(1, len(found)):

        def far(i: int, before: list[int] = found[:n]) -> float:
            return min(abs(points[i][1] - points[j][1]) for j in before)

        assert far(found[n]) == max(far(i) for i in found[n:])


def layers(points: list[tuple[float, float]]) -> Layers:
    found = Layers()
    for i, point in enumerate(points):
        found.add(i, point)
    return found


def climbs(earlier: list[tuple[float, float]], new: tuple[float, float], reduction: float) -> bool:
    points = [*earlier, new]
    return len(earlier) in climbers(points, layers(points), reduction)


def climbs_by_definition(
    earlier: list[tuple[float, float]], new: tuple[float, float], reduction: float
) -> bool:
    """Front by front, within a front from pick to pick, everything by comparing all with all."""
    points = [*earlier, new]
    left, order = set(range(len(points))), []
    while left:
        known = sorted(left)
        peel = {known[i] for i in brute_front([points[i] for i in known])}
        left -= peel
        before = len(order)
        for _ in range(len(peel)):
            ranked = sorted(peel - set(order), key=lambda i: (points[i], i))
            chosen = order[before:]

            def far(i: int, chosen: list[int] = chosen) -> float:
                return min((abs(points[i][1] - points[j][1]) for j in chosen), default=0.0)

            order.append(max(ranked, key=far))  # the first of those that are as far
    return order.index(len(points) - 1) < math.ceil(len(points) / reduction)


@given(POINTS, POINT, st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0]))
def test_climbs_as_defined(
    earlier: list[tuple[float, float]], new: tuple[float, float], reduction: float
) -> None:
    assert climbs(earlier, new, reduction) == climbs_by_definition(earlier, new, reduction)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60))
def test_climbs_as_defined_among_many_without_ties(points: list[tuple[float, float]]) -> None:
    for at in range(0, len(points), 7):
        args = points[:at], points[at], 2.0
        assert climbs(*args) == climbs_by_definition(*args)


def test_one_long_front_is_climbed_along_latency() -> None:
    """Nobody dominates anybody: places go to those that fill the widest gap."""
    points = [(1 - t / 999, t / 999) for t in range(1000)]
    assert climbs(points[:400] + points[500:], points[450], 2.0)
    close = [(1 - t / 9e9, t / 9e9) for t in range(1, 999)]
    assert not climbs([points[0], points[999], *close[1::2]], close[100], 2.0)


def test_chance_is_a_share_that_neither_order_nor_rung_moves() -> None:
    rungs = ("short", "full")
    drawn = {(d, r): by_chance(1, EARLY + d, f"{d:064x}", r) for d in range(4000) for r in rungs}
    for rung in ("short", "full"):
        share = sum(drawn[d, rung] for d in range(4000)) / 4000
        assert abs(share - CHANCE) < 3 * (CHANCE / 4000) ** 0.5
    assert sum(drawn[d, "short"] and drawn[d, "full"] for d in range(4000)) < 4000 * CHANCE / 4
    assert [by_chance(2, EARLY, f"{d:064x}", "short") for d in range(4000)] != [
        drawn[d, "short"] for d in range(4000)
    ]
    assert not any(by_chance(1, EARLY - 1, f"{d:064x}", "short") for d in range(4000))


@given(POINTS, POINT, st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0]))
def test_climbs_if_its_layer_has_a_place(
    earlier: list[tuple[float, float]], new: tuple[float, float], reduction: float
) -> None:
    points = [*earlier, new]
    places = math.ceil(len(points) / reduction)
    ranks = {i: r for r, layer in enumerate(layers(points)) for i in layer}
    mine = ranks[len(points) - 1]
    better = sum(r < mine for r in ranks.values())
    same = sum(r == mine for r in ranks.values())
    goes = climbs(earlier, new, reduction)
    if better >= places:
        assert not goes
    if better + same <= places:
        assert goes
    if not earlier or reduction == 1:
        assert goes
