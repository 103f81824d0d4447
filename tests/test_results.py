"""Limits, finalists and the choice of the best, against brute force."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flyweight.kernels import Timing
from flyweight.search.limits import Limits, limits
from flyweight.search.results import FINALISTS, choose, final_front, finalists

ROW = st.fixed_dictionaries(
    {
        "metric": st.integers(80, 95).map(float),
        "latency_ms": st.integers(1, 9).map(float),
        "size_bytes": st.integers(1, 9),
        "compressed_bytes": st.integers(1, 9),
    }
)
ROWS = st.lists(ROW, max_size=10).map(
    lambda rows: [r | {"digest": str(i)} for i, r in enumerate(rows)]
)
LIMITS = st.builds(
    Limits,
    st.just(92.0),
    st.none() | st.integers(1, 9).map(float),
    st.none() | st.integers(0, 6).map(float),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 9),
)


def small(row: dict[str, Any], bound: Limits) -> bool:
    names = ("size_bytes", "compressed_bytes")
    return all((most := getattr(bound, n)) is None or row[n] <= most for n in names)


def keeps(row: dict[str, Any], bound: Limits) -> bool:
    return (
        (bound.latency_ms is None or row["latency_ms"] <= bound.latency_ms)
        and small(row, bound)
        and (bound.max_drop is None or bound.teacher_metric - row["metric"] <= bound.max_drop)
    )


@given(ROWS, LIMITS)
def test_best_and_nearest_miss(rows: list[dict[str, Any]], bound: Limits) -> None:
    best, miss = choose(rows, bound)
    feasible = [r for r in rows if keeps(r, bound)]
    by = {r["digest"]: r for r in rows}
    if not rows:
        assert (best, miss) == (None, None)
    elif not feasible:
        assert best is None
        assert miss in by
    elif bound.max_drop is not None:
        assert by[best or ""] in feasible
        assert by[best or ""]["latency_ms"] == min(r["latency_ms"] for r in feasible)
    else:
        assert by[best or ""] in feasible
        assert by[best or ""]["metric"] == max(r["metric"] for r in feasible)
    assert best is None or miss is None


@given(ROW, LIMITS)
def test_excess_is_positive_only_over_a_limit(row: dict[str, Any], bound: Limits) -> None:
    assert (bound.excess(**row) > 0) != keeps(row, bound)


@given(st.lists(ROW, min_size=1, max_size=4), LIMITS)
def test_out_of_reach_is_what_no_case_keeps(rows: list[dict[str, Any]], bound: Limits) -> None:
    found = bound.out_of_reach(rows)
    for name in ("latency_ms", "size_bytes", "compressed_bytes"):
        most = getattr(bound, name)
        near = 1.15 if name == "latency_ms" else 1.0
        assert (name in found) == (most is not None and all(r[name] > near * most for r in rows))
        assert found.get(name) in (None, min(r[name] for r in rows))


def test_a_drop_that_is_the_limit_is_within_it() -> None:
    assert Limits(92.3, max_drop=0.1).excess(92.2, 1.0, 1, 1) <= 0  # 92.3 - 92.2 > 0.1 in floats


@given(ROWS, LIMITS)
def test_the_nearest_miss_does_not_hang_on_the_unit_of_the_metric(
    rows: list[dict[str, Any]], bound: Limits
) -> None:
    """0 to 1, per cent, or the negative of an error in some unit."""
    for unit in (0.01, -3.0):
        drop = None if bound.max_drop is None else bound.max_drop * abs(unit)
        other = replace(bound, teacher_metric=92.0 * unit, max_drop=drop)
        lost = [92.0 - r["metric"] for r in rows]
        same = [
            r | {"metric": 92.0 * unit - n * abs(unit)} for r, n in zip(rows, lost, strict=True)
        ]
        assert choose(same, other) == choose(rows, bound)


def test_limits_of_an_objective() -> None:
    assert limits({"speedup": 2.5}, 90.0, 5.0).latency_ms == 2.0
    assert limits({"latency_ms": 3.0}, 90.0, 5.0).latency_ms == 3.0
    assert limits({"max_drop": 1.0, "size_bytes": 5}, 90.0, 5.0) == Limits(90.0, None, 1.0, 5)
    assert limits({"compressed_bytes": 5}, 90.0, 5.0) == Limits(90.0, compressed_bytes=5)


@given(st.lists(ROW, max_size=40), LIMITS)
def test_finalists_are_the_front_and_at_most_twelve(
    rows: list[dict[str, Any]], bound: Limits
) -> None:
    entries = [
        {**r, "rung": "full", "digest": str(i), "latency_ms": [0.0, r["latency_ms"], 99.0],
         "loss": r["size_bytes"] * 7 % 5 / 10, "constraint": bound.excess(**r)}
        for i, r in enumerate(rows)
    ]  # fmt: skip
    rivals = [e for e in entries if small(e, bound)] or list(entries)
    entries += [dict(e, rung="short", digest="s" + e["digest"], metric=99.0) for e in entries]
    found = finalists(entries, bound)
    assert len(found) <= FINALISTS
    assert all(e["rung"] == "full" and e in rivals for e in found)
    least = min((e["constraint"] for e in rivals), default=0.0)
    near = [] if any(small(e, bound) for e in entries) else [
        e for e in found if e["constraint"] == least
    ]  # fmt: skip
    assert not rivals or near or any(small(e, bound) for e in entries)
    for e in found:
        assert e in near or not all(
            _dominated(e, rivals, *figure) for figure in (("metric", 1), ("loss", -1))
        )
    if len(found) < FINALISTS:
        ahead = [e for e in rivals if not _dominated(e, rivals, "metric", 1)]
        points = {(e["metric"], e["latency_ms"][1]) for e in found}
        assert {(e["metric"], e["latency_ms"][1]) for e in ahead} <= points


def _dominated(e: dict[str, Any], rivals: list[dict[str, Any]], figure: str, sign: int) -> bool:
    return any(
        sign * o[figure] >= sign * e[figure] and o["latency_ms"][1] <= e["latency_ms"][1]
        and (o[figure], o["latency_ms"]) != (e[figure], e["latency_ms"])
        for o in rivals
    )  # fmt: skip


def test_what_was_predicted_is_given_for_the_machine_as_fast_as_when_it_was_measured() -> None:
    entry = {
        "digest": "a", "metric": 90.0, "latency_ms": [0.9, 1.0, 1.2], "size_bytes": 5,
        "compressed_bytes": 4, "artifact": "a", "loss": 0.1,
    }  # fmt: skip
    timings = {"teacher": Timing((3.0,)), "a": Timing((1.5,))}  # the teacher took 2 before
    header = {"teacher": {"metric": 92.0, "latency_ms": 2.0}, "objective": {"max_drop": 1.0}}
    (row,) = final_front(header, [entry], {}, timings)
    assert row["latency_ms"] == 1.5
    assert row["predicted_latency_ms"] == [1.5 * ms for ms in (0.9, 1.0, 1.2)]


def test_where_nothing_is_small_enough_the_nearest_is_the_smallest() -> None:
    """Another is better and faster, but much larger."""

    def entry(digest: str, metric: float, latency_ms: float, size: int) -> dict[str, Any]:
        return {
            "digest": digest, "rung": "full", "metric": metric, "loss": 95 - metric,
            "size_bytes": size, "compressed_bytes": size, "latency_ms": [latency_ms] * 3,
            "artifact": digest,
            "constraint": bound.excess(metric, latency_ms, size, size),
        }  # fmt: skip

    bound = Limits(92.0, max_drop=1.0, size_bytes=100)
    known = [entry("near", 91.5, 2.0, 110), entry("large", 91.8, 1.0, 300)]
    assert {e["digest"] for e in finalists(known, bound)} == {"near", "large"}
    header = {
        "teacher": {"metric": 92.0, "latency_ms": 4.0},
        "objective": {"max_drop": 1.0, "size_bytes": 100},
    }
    rows = final_front(header, known, {}, None)
    assert [row["digest"] for row in rows] == ["large", "near"]
    assert choose(rows, bound) == (None, "near")
    many = [entry(f"{i}", 91.8 - i / 100, 1.0 - i / 100, 300) for i in range(2 * FINALISTS)]
    found = {e["digest"] for e in finalists([*many, *known], bound)}
    assert "near" in found
    assert len(found) == FINALISTS


def test_what_was_not_trained_is_one_finalist_whatever_its_settings() -> None:
    def entry(digest: str, settled: bool) -> dict[str, Any]:
        return {
            "digest": digest, "rung": "full", "metric": 90.0, "loss": 0.1, "size_bytes": 5,
            "compressed_bytes": 4, "latency_ms": [0.9, 1.0, 1.1], "constraint": 0.0,
            "settled": settled,
        }  # fmt: skip

    assert len(finalists([entry("a", True), entry("b", True)], Limits(92.0))) == 1
    assert len(finalists([entry("a", False), entry("b", False)], Limits(92.0))) == 2
