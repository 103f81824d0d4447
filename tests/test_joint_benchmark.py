"""The recorded benchmark: the table holds what it says, and the surrogate answers any policy."""

import dataclasses
import math
import random
from pathlib import Path
from types import ModuleType

import joint_record as record
import joint_rungs as rungs
import joint_surrogate as fitted
import joint_table as table
import numpy as np
import pytest

from flyweight.compressors import RUNGS


@pytest.fixture(scope="module")
def rows() -> list[table.Row]:
    return table.read()


@pytest.fixture(scope="module")
def surrogate(rows: list[table.Row]) -> fitted.Surrogate:
    return fitted.Surrogate(rows)


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    pytest.importorskip("moocore", reason="of the benchmarks alone")
    import joint_compare

    return joint_compare


def test_the_table_holds_legal_policies_once_a_seed(rows: list[table.Row]) -> None:
    for row in rows:
        table.space().check(row.policy)
    trials = [(row.policy.digest, row.seed) for row in rows]
    assert len(set(trials)) == len(trials)


def test_the_table_is_as_large_as_promised(rows: list[table.Row]) -> None:
    groups = list(table.by_policy(rows))
    assert len(groups) >= 120
    assert sum(len(same) == record.SEEDS for same in groups) >= 10
    assert {row.source for row in rows} == set(record.SOURCES)
    assert {row.kind for row in rows} >= set(record.KINDS)
    assert table.TABLE.stat().st_size < 300_000


def test_figures_are_possible(rows: list[table.Row]) -> None:
    for row in rows:
        assert list(row.rungs) == list(RUNGS[: len(row.rungs)])
        assert row.whole != bool(row.error)
        for figures in row.rungs.values():
            assert figures["loss"] > -1e-6
            assert 0 <= figures["metric"] <= 100
            assert figures["seconds"] > 0
        if row.whole:
            assert 0.1 < row.latency < 1.1


def test_a_row_is_read_as_it_was_written(rows: list[table.Row], tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    failed = dataclasses.replace(rows[0], rungs={}, latency=math.nan, size_bytes=0, error="a, b")
    for row in (*rows[:5], failed):
        table.append(row, path)
    assert table.read(path)[:5] == rows[:5]
    last = table.read(path)[5]
    assert (last.policy, last.error, last.whole) == (rows[0].policy, "a, b", False)


def test_a_line_that_was_cut_off_is_left_out_and_goes(
    rows: list[table.Row], tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    for row in rows[:3]:
        table.append(row, path)
    path.write_bytes(path.read_bytes()[:-20])
    assert table.read(path) == rows[:2]
    table.append(rows[3], path)
    assert table.read(path) == [*rows[:2], rows[3]]


def test_what_comes_next_depends_on_the_table_alone(rows: list[table.Row]) -> None:
    for count in (0, 1, 7, len(rows)):
        first = record.due(table.space(), rows[:count])
        assert record.due(table.space(), rows[:count]) == first
        table.space().check(first[1])
        assert first[1].digest not in {r.policy.digest for r in rows[:count]} or first[2] > 0


def test_the_tenth_policy_is_repeated_until_its_seeds_are_there(rows: list[table.Row]) -> None:
    ten = [same[0] for same in table.by_policy(rows)][: record.REPEATED]
    source, policy, seed = record.due(table.space(), ten)
    assert (source, policy, seed) == (ten[-1].source, ten[-1].policy, 1)
    again = dataclasses.replace(ten[-1], seed=1)
    assert record.due(table.space(), [*ten, again])[1:] == (policy, 2)
    thrice = [*ten, again, dataclasses.replace(again, seed=2)]
    assert record.due(table.space(), thrice)[1] != policy


def test_held_out_policies_are_predicted(rows: list[table.Row]) -> None:
    whole = [row for row in rows if row.whole]
    found, true = fitted.held_out(whole, fitted.MODEL), fitted.targets(whole)
    for i in range(len(RUNGS)):
        assert fitted.errors(found[:, 3 * i], true[:, 3 * i])["r2"] > 0.5
    latency = np.array([row.latency for row in whole])
    assert fitted.errors(fitted.held_out_latency(whole), latency)["r2"] > 0.9


def test_a_surrogate_answers_any_policy_the_same_each_time(surrogate: fitted.Surrogate) -> None:
    policy = table.space().sample(random.Random(1))
    alone, together = surrogate.expected(policy), fitted.Surrogate(surrogate.rows)
    together.learn([table.space().sample(random.Random(i)) for i in range(3)])
    assert together.expected(policy)[RUNGS[-1]] == pytest.approx(alone[RUNGS[-1]])
    assert together.trial(policy, 3) == surrogate.trial(policy, 3)
    low, middle, high = surrogate.latency(policy)
    assert 0 < low < middle < high < 1.5


def test_noise_is_that_of_a_repeated_trial_at_all_rungs_together(
    surrogate: fitted.Surrogate,
) -> None:
    policy = table.space().uniform(0.5, "int8")
    seen = fitted.deviations(surrogate.rows)
    drawn = set()
    for seed in range(20):
        noisy, clean = surrogate.trial(policy, seed), surrogate.expected(policy)
        shift = [math.log(noisy[r]["loss"] / clean[r]["loss"]) for r in RUNGS]
        nearest = np.abs(seen[:, ::3] - shift).max(1)
        assert nearest.min() < 1e-9
        drawn.add(int(nearest.argmin()))
        assert noisy["full"]["seconds"] == clean["full"]["seconds"]
    assert len(drawn) > 5
    assert seen[:, 6].std() > 0


def test_rungs_that_order_alike_agree(rows: list[table.Row]) -> None:
    same = [dataclasses.replace(r, rungs={**r.rungs, "short": r.rungs["full"]}) for r in rows]
    some = [row for row in same if row.whole]
    spearman, partial = rungs.agreement(some, "short", "loss", "loss")
    assert spearman == pytest.approx([1, 1, 1])
    assert partial == pytest.approx([1, 1, 1])


def test_hypervolume_against_one_by_hand(compare: ModuleType) -> None:
    # Rectangles up to (1, 5), and two points that are not inside.
    points = [(0.5, 1.0), (0.25, 3.0), (1.5, 0.0), (0.1, 6.0)]
    assert compare.hypervolume(points) == pytest.approx(0.5 * 4 + 0.25 * 2)
    assert compare.hypervolume([(2.0, 0.0)]) == 0


def test_curves_are_read_at_a_cost_and_at_a_volume(compare: ModuleType) -> None:
    curve = [(1.0, 0.2), (3.0, 0.7), (8.0, 0.9)]
    assert [compare.at(curve, cost) for cost in (0.5, 3.0, 7.9, 100)] == [0.0, 0.7, 0.7, 0.9]
    assert compare.reached(curve, 0.6) == 3.0
    assert compare.reached(curve, 0.95) == math.inf


@pytest.mark.slow
def test_every_method_is_charged_for_what_it_runs(
    compare: ModuleType, surrogate: fitted.Surrogate
) -> None:
    bench = compare.Bench.of(surrogate)
    assert bench.prepared_s > 0
    begins, climbed = {}, {}
    prepared = bench.prepared_s / surrogate.trial_seconds  # in trials
    for name in ("random", "random with rungs", "uniform", "solver", "joint"):
        warm = name in ("solver", "joint")  # whose solver passes on the clock by what it takes here
        cost = 6.0 + prepared * warm
        curve, counts = compare.run(compare.METHODS[name], 0, bench, cost)
        if not warm:
            assert compare.run(compare.METHODS[name], 0, bench, cost) == (curve, counts)
        assert counts["recalibrate"] >= counts["full"] > 0
        assert 0 < curve[0][0] < curve[-1][0] < cost + 2
        begins[name], climbed[name] = curve[0][0], counts["full"] / counts["recalibrate"]
    assert climbed["random"] > climbed["random with rungs"]
    for name in ("solver", "joint"):
        assert begins[name] > prepared


def test_a_rung_that_is_unheeded_decides_nothing(compare: ModuleType) -> None:
    control = compare.WithoutShort.__new__(compare.WithoutShort)
    assert control._through({"rung": "short", "loss": math.inf}) == "rank"


def test_rows_near_what_was_solved_are_left_out(compare: ModuleType, rows: list[table.Row]) -> None:
    solved, left = record.solved(), compare.without_solved(rows)
    assert 0.5 * len(rows) < len(left) < len(rows)
    gone = [row.source for row in rows if row not in left]
    assert gone.count("near") > 0.5 * len(gone)  # what was drawn around them
    assert not {row.policy for row in left} & {*solved}
