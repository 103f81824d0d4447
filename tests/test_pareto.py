"""Fronts and climbing, against brute force."""

import math

from hypothesis import given
from hypothesis import strategies as st

from flyweight.search.pareto import climbs, dominates, front, layers, spread_order

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


@given(POINTS)
def test_layers_peel_fronts(points: list[tuple[float, float]]) -> None:
    left = set(range(len(points)))
    for layer in layers(points):
        order = sorted(left)
        assert set(layer) == {order[i] for i in brute_front([points[i] for i in order])}
        left -= set(layer)
    assert not left


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
