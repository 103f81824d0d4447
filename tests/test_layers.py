"""Fronts behind fronts, against brute force."""

from hypothesis import given
from hypothesis import strategies as st

from flyweight.search.layers import Layers
from flyweight.search.pareto import dominates

COORDINATE = st.integers(0, 6).map(float)  # few values: many ties
POINT = st.tuples(COORDINATE, COORDINATE)


def peeled(points: dict[int, tuple[float, float]]) -> list[list[int]]:
    """Front by front, everything by comparing all with all."""
    left, out = dict(points), []
    while left:
        on = [i for i, p in left.items() if not any(dominates(q, p) for q in left.values())]
        out.append(sorted(on, key=lambda i: (points[i][1], i)))
        left = {i: p for i, p in left.items() if i not in on}
    return out


@given(st.lists(st.tuples(POINT, st.integers(0, 30)), max_size=30))
def test_fronts_are_peeled_whoever_comes_and_goes(
    steps: list[tuple[tuple[float, float], int]],
) -> None:
    """Of one in two steps, where there is somebody, one goes too."""
    layers, known = Layers(), dict[int, tuple[float, float]]()
    for who, (point, goes) in enumerate(steps):
        layers.add(who, point)
        known[who] = point
        assert list(layers) == peeled(known)
        if goes in known:
            layers.remove(goes)
            del known[goes]
            assert list(layers) == peeled(known)
