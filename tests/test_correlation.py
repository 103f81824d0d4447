"""What rungs say of each other: weights, latency, the bias of having seen the best alone."""

import random
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.compressors import RUNGS
from flyweight.search.correlation import ENOUGH, Agreement, agreements, rank_correlations
from flyweight.search.pareto import CHANCE, EARLY
from flyweight.search.record import Entry

COLUMN = st.integers(0, 5).map(float)
ROWS = st.lists(st.tuples(COLUMN, COLUMN, COLUMN, st.integers(1, 4)), min_size=3, max_size=20)


def midranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + sum(v == x for v in values) / 2 for x in values]


def correlation(a: Any, b: Any) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def residual(of: list[float], on: list[float]) -> Any:
    slope = np.linalg.lstsq(np.stack([np.ones(len(on)), on], 1), np.array(of), rcond=None)[0]
    return np.array(of) - slope[0] - slope[1] * np.array(on)


@given(ROWS)
def test_a_weight_is_as_many_rows(rows: list[tuple[float, float, float, int]]) -> None:
    columns = np.array([row[:3] for row in rows])
    weights = np.array([row[3] for row in rows], float)
    found = rank_correlations(columns, weights)
    a, b, c = (midranks(list(x)) for x in np.repeat(columns, weights.astype(int), axis=0).T)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found == (None, None)
        return
    assert found[0] == pytest.approx(correlation(a, b), abs=1e-9)
    if len(set(c)) == 1 or max(abs(correlation(a, c)), abs(correlation(b, c))) > 1 - 1e-9:
        assert found[1] is None
    else:  # what is left of both when latency's share is taken out
        expected = correlation(residual(a, c), residual(b, c))
        assert found[1] == pytest.approx(expected, abs=1e-6)


def entry(digest: int, rung: str, loss: float, latency: float, through: str | None) -> Entry:
    return {
        "kind": "result", "trial": digest, "digest": str(digest), "rung": rung, "loss": loss,
        "latency_ms": [latency] * 3, "through": through,
    }  # fmt: skip


def population(rng: random.Random, n: int) -> list[tuple[float, float, float]]:
    """(loss below, loss above, latency): the faster, the more is lost at both; noise between."""
    rows = []
    for _ in range(n):
        latency, quality = rng.random(), rng.gauss(0.0, 0.3)
        below = quality - latency + rng.gauss(0.0, 0.3)
        rows.append((below, quality - latency, latency))
    return rows


def climbed(rng: random.Random, rows: list[tuple[float, float, float]]) -> list[Entry]:
    """The record of a search that lets the better half on, and a few of the others by chance."""
    middle = statistics.median(row[0] for row in rows)
    entries = []
    for digest, (below, above, latency) in enumerate(rows):
        late = digest >= EARLY
        by_chance = "chance" if late and rng.random() < CHANCE else None
        through = "rank" if below < middle else by_chance
        entries.append(entry(digest, RUNGS[0], below, latency, through))
        if through:
            entries.append(entry(digest, RUNGS[1], above, latency, None))
    return entries


def test_chance_takes_the_bias_away() -> None:
    rng = random.Random(0)
    truth, estimated, naive = [], [], []
    for _ in range(60):
        rows = population(rng, 1200)
        known = climbed(rng, rows)
        found = agreements(known)[0]
        truth.append(rank_correlations(np.array(rows), np.ones(len(rows))))
        estimated.append((found.spearman, found.partial))
        pairs = np.array([rows[int(e["digest"])] for e in known if e["through"] == "rank"])
        naive.append(rank_correlations(pairs, np.ones(len(pairs))))
        assert not found.biased
        assert found.by_chance >= ENOUGH
    means = [np.mean(np.array(each, float), axis=0) for each in (truth, estimated, naive)]
    assert np.abs(means[1] - means[0]).max() < 0.03
    assert (means[0] - means[2]).min() > 0.1  # the best alone are harder to tell apart


def test_too_few_by_chance_are_counted_as_they_are_and_said_to_be_biased() -> None:
    rows = [(0.1, 0.2, 1.0), (0.2, 0.1, 2.0), (0.3, 0.4, 3.0), (0.4, 0.3, 1.5)]
    entries = []
    for digest, (below, above, latency) in enumerate(rows):
        entries.append(entry(digest, RUNGS[0], below, latency, "chance" if digest else "rank"))
        entries.append(entry(digest, RUNGS[1], above, latency, None))
    found, other = agreements(entries)
    assert (found.pairs, found.by_chance, found.biased) == (4, 3, True)
    assert found.spearman == pytest.approx(correlation([1, 2, 3, 4], [2, 1, 4, 3]))
    assert other == Agreement("short", "full", 0, 0, None, None, True)


def test_of_an_earlier_version_all_count_as_they_are() -> None:
    """There the first trials went on by chance, too."""
    rows = population(random.Random(0), EARLY)
    entries = []
    for digest, (below, above, latency) in enumerate(rows):
        entries.append(entry(digest, RUNGS[0], below, latency, "chance"))
        entries.append(entry(digest, RUNGS[1], above, latency, None))
    found = agreements(entries)[0]
    assert (found.pairs, found.by_chance, found.biased) == (EARLY, EARLY, True)
    assert found.spearman is not None


def test_of_a_trial_that_began_anew_the_newest_counts_and_old_records_are_read() -> None:
    entries = [entry(d, r, float(d), 1.0, "rank") for d in range(4) for r in RUNGS[:2]]
    again = [entry(0, r, 9.0, 1.0, "rank") for r in RUNGS[:2]]
    found = agreements([*entries, {"kind": "search"}, *again])[0]
    assert (found.pairs, found.partial) == (4, None)
    assert found.spearman == pytest.approx(1.0)
    for each in entries:
        del each["through"]
    assert agreements(entries)[0].biased
