"""The search without Ray: record, fronts, limits, proposals, and the controller's decisions."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.compressors import RUNGS
from flyweight.search.controller import Budget, Controller, Price
from flyweight.search.limits import Limits, limits
from flyweight.search.pareto import climbs, dominates, front, layers
from flyweight.search.proposals import Proposals
from flyweight.search.record import FileRecord, MemoryRecord, read
from flyweight.search.results import choose, finalists
from flyweight.spaces import BadInput, Impossible, Policy, Settings, Space, trace

points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


class TestFront:
    @given(points)
    def test_front_is_what_nobody_dominates(self, some: list[tuple[int, int]]) -> None:
        kept = {some[i] for i in front(some)}
        assert kept == {p for p in some if not any(dominates(q, p) for q in some)}

    @given(points)
    def test_layers_hold_every_point_once(self, some: list[tuple[int, int]]) -> None:
        assert sorted(i for layer in layers(some) for i in layer) == list(range(len(some)))

    def test_the_first_climbs_and_the_dominated_does_not(self) -> None:
        assert climbs([], (1.0, 1.0), 2)
        assert not climbs([(1.0, 1.0)], (2.0, 2.0), 2)
        assert climbs([(1.0, 1.0)], (0.5, 0.5), 2)

    @given(points)
    def test_a_reduction_of_one_lets_all_climb(self, some: list[tuple[int, int]]) -> None:
        assert climbs(some[:-1], some[-1], 1)


class TestLimits:
    def test_speedup_is_a_latency(self) -> None:
        found = limits({"speedup": 2.0, "max_drop": 0.5}, 90.0, 1.0)
        assert found == Limits(90.0, 0.5, 0.5, None)

    def test_a_drop_of_the_limit_is_within_it(self) -> None:
        found = Limits(94.1, None, 0.5)
        assert found.excess(93.6, 1.0, 1) <= 0
        assert found.excess(93.58, 1.0, 1) > 0

    def test_best_is_the_fastest_feasible_with_max_drop(self) -> None:
        rows = [
            {"digest": "slow", "metric": 90.0, "latency_ms": 0.5, "size_bytes": 1},
            {"digest": "fast", "metric": 89.6, "latency_ms": 0.4, "size_bytes": 1},
            {"digest": "bad", "metric": 80.0, "latency_ms": 0.1, "size_bytes": 1},
        ]
        assert choose(rows, Limits(90.0, 0.5, 0.5)) == ("fast", None)
        assert choose(rows, Limits(90.0, 0.5)) == ("slow", None)
        assert choose(rows, Limits(90.0, 0.2, 0.5)) == (None, "fast")
        assert choose([], Limits(90.0, 0.2, 0.5)) == (None, None)

    def test_finalists_are_full_results_only(self) -> None:
        def entry(rung: str, digest: str, metric: float, ms: float) -> dict[str, Any]:
            latency = [ms, ms, ms]
            return {"rung": rung, "digest": digest, "metric": metric, "latency_ms": latency}

        entries = [
            entry("short", "a", 99, 0.1),
            entry("full", "b", 90, 1),
            entry("full", "c", 89, 2),
        ]
        assert [e["digest"] for e in finalists(entries)] == ["b"]


class TestRecord:
    def test_appends_survive_and_a_torn_line_goes(self, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        record = FileRecord(path)
        record.append({"kind": "end", "n": 1})
        record.close()
        path.write_bytes(path.read_bytes() + b'{"kind":"resu')
        record = FileRecord(path)
        record.append({"kind": "end", "n": 2})
        record.close()
        assert [e["n"] for e in read(path)] == [1, 2]

    def test_damage_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        path.write_bytes(b'{"kind":"end"}\n{broken\n{"kind":"end"}\n')
        with pytest.raises(BadInput, match="line 2"):
            list(read(path))

    def test_a_second_writer_is_refused(self, tmp_path: Path) -> None:
        record = FileRecord(tmp_path / "record.jsonl")
        with pytest.raises(BadInput, match="another search"):
            FileRecord(tmp_path / "record.jsonl")
        record.close()

    def test_a_full_disk_leaves_no_half_line(self, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        code = f"""
import resource, signal, pathlib
from flyweight.search.record import FileRecord
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
record = FileRecord(pathlib.Path({str(path)!r}))
record.append({{"kind": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
try:
    record.append({{"kind": "x" * 100}})
except OSError:
    print("refused")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "refused", done.stderr
        assert list(read(path)) == [{"kind": 1}]


@pytest.fixture(scope="module")
def network(resnet: Any) -> Any:
    return trace(resnet.ResNet(), torch.rand(1, 1, 28, 28))


@pytest.fixture(scope="module")
def space(network: Any, capabilities: Any) -> Space:
    settings = Settings(qat=(True, False), temperature=(1.0, 8.0), learning_rate=(0.001, 0.1))
    return Space(network, capabilities, settings)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def price(space: Space) -> Any:
    """Latency proportional to the channels kept: a stand-in with the right slope."""
    full = sum(g.width for g in space.network.groups.values())

    def of(policy: Policy) -> Price:
        kept = sum(policy.prune.width.get(n, g.width) for n, g in space.network.groups.items())
        ms = kept / full
        return Price((ms, ms, ms), 1000)

    return of


def controller(space: Space, record: Any, **changes: Any) -> Controller:
    options: dict[str, Any] = {"trials": 12, "seconds": None, "clock": Clock(), "limit": 0.6}
    options |= changes
    return Controller(
        Proposals(space, seed=1, first=options.get("first", [])),
        options.get("price", price(space)),
        Limits(90.0, options["limit"], options.get("max_drop")),
        record,
        Budget(options["trials"], options["seconds"]),
        clock=options["clock"],
    )


def run(search: Controller, steps: int = 10_000, fail: bool = False) -> int:
    """Runs trials one after another; how many rungs were run."""
    rungs = 0
    rng = random.Random(0)
    while rungs < steps and (trial := search.propose()):
        for rung in RUNGS:
            rungs += 1
            outcome = {"rung": rung, "loss": rng.random(), "metric": 89.8, "size_bytes": 1000}
            outcome |= {"rung_seconds": 1.0, "seconds": 1.0, "samples": 1, "artifact": None}
            if fail:
                outcome = {"rung": rung, "error": "no such luck"}
            if isinstance(search._clock, Clock):
                search._clock.now += 1.0
            if not search.result(trial.number, outcome) or rungs == steps:
                break
    return rungs


class TestController:
    def test_no_trial_is_over_the_limit(self, space: Space) -> None:
        record = MemoryRecord()
        search = controller(space, record, first=[space.uniform(1.0)])
        run(search)
        search.close()
        begun = [e for e in record.entries() if e["kind"] == "begin"]
        assert len(begun) == 12
        assert all(e["latency_ms"][1] <= 0.6 for e in begun)
        assert any(e["kind"] == "rejected" for e in record.entries())
        assert len({e["digest"] for e in begun}) == 12
        assert search.proposals.running() == 0

    def test_a_policy_over_the_limit_is_shrunk_to_just_within(self, space: Space) -> None:
        search = controller(space, MemoryRecord(), first=[space.uniform(1.0, "int8")])
        trial = search.propose()
        assert trial is not None
        assert 0.45 < trial.price.latency_ms[1] <= 0.6
        assert set(trial.policy.quantize.precision.values()) == {"int8"}

    def test_nothing_within_the_limit_ends_the_search(self, space: Space) -> None:
        search = controller(space, MemoryRecord(), limit=0.01)
        assert search.propose() is None
        assert search.over()

    def test_a_policy_that_cannot_be_built_is_rejected(self, space: Space) -> None:
        def impossible(_: Policy) -> Price:
            raise Impossible("not on this target")

        record = MemoryRecord()
        search = controller(space, record, price=impossible)
        assert search.propose() is None
        assert record.entries()[0]["reason"] == "not on this target"
        assert search.proposals.running() == 0

    def test_the_deadline_stops_proposals_and_lets_trials_end(self, space: Space) -> None:
        clock = Clock()
        search = controller(space, MemoryRecord(), seconds=5.0, clock=clock, trials=1000)
        run(search)
        assert 5.0 <= clock.now <= 5.0 + len(RUNGS)
        assert search.propose() is None
        assert search.results("full")

    def test_all_failing_ends_early(self, space: Space) -> None:
        search = controller(space, MemoryRecord(), trials=1000)
        assert run(search, fail=True) == 8
        assert search.hopeless()

    def test_a_late_result_changes_nothing(self, space: Space) -> None:
        record = MemoryRecord()
        search = controller(space, record)
        trial = search.propose()
        assert trial is not None
        search.failed(trial.number, "its node went")
        before = record.entries()
        assert not search.result(trial.number, {"rung": "recalibrate"})
        assert record.entries() == before

    def test_trials_like_those_that_lost_too_much_stop(self, space: Space) -> None:
        search = controller(space, MemoryRecord(), max_drop=0.1)  # every full result loses 0.2
        run(search)
        search.close()
        full = [t for t in search.trials.values() if "full" in t.results]
        assert len(full) >= 2
        bar = max(t.results["recalibrate"]["loss"] for t in full[:2])
        later = [t for t in search.trials.values() if t.number > full[1].number]
        assert all(
            "short" not in t.results for t in later if t.results["recalibrate"]["loss"] >= bar
        )

    def test_a_record_that_cannot_be_written_ends_it(self, space: Space) -> None:
        class Full(MemoryRecord):
            def append(self, _: Any) -> None:
                raise OSError("No space left on device")

        search = controller(space, Full())
        assert search.propose() is None
        assert search.fatal is not None

    @pytest.mark.parametrize("cut", [1, 4, 7, 13, 21])
    def test_a_killed_search_goes_on_from_any_prefix(self, space: Space, cut: int) -> None:
        whole = MemoryRecord()
        whole.append({"kind": "search", "time": 0.0})
        run(controller(space, whole))
        record = MemoryRecord(whole.entries()[:cut])
        done = {e["trial"] for e in record.entries() if e["kind"] == "end"}
        search = controller(space, record)
        run(search)
        search.close()
        ended = [e["trial"] for e in record.entries() if e["kind"] == "end"]
        assert sorted(ended) == list(range(12)), "every trial ends once"
        again = {e["trial"] for e in record.entries()[cut:] if e["kind"] in ("begin", "result")}
        assert not again & done, "no finished trial is repeated"
        assert search.proposals.running() == 0

    def test_time_spent_before_a_resume_counts(self, space: Space) -> None:
        clock = Clock()
        record = MemoryRecord([{"kind": "search", "time": 0.0}])
        run(controller(space, record, clock=clock), steps=5)
        spent = clock.now
        clock.now = 1000.0
        assert controller(space, record, clock=clock).elapsed() == pytest.approx(spent, abs=1.0)


class TestProposals:
    def test_a_space_with_one_policy_ends(self, network: Any, capabilities: Any) -> None:
        one = Space(network, capabilities, Settings(min_keep=1.0, precisions=("fp32",)))
        proposals = Proposals(one)
        assert proposals.ask() is not None
        assert proposals.ask() is None

    def test_the_same_seed_proposes_the_same(self, space: Space) -> None:
        def some() -> list[str]:
            proposals, rng = Proposals(space, seed=3), random.Random(0)
            out = []
            for _ in range(25):
                policy = proposals.ask()
                assert policy is not None
                out.append(policy.digest)
                proposals.tell(policy, "recalibrate", rng.random(), rng.random(), -0.1)
            return out

        first = some()
        assert first == some()
        assert len(set(first)) == 25

    def test_every_proposal_is_legal(self, space: Space) -> None:
        proposals = Proposals(space, seed=5)
        for _ in range(30):
            policy = proposals.ask()
            assert policy is not None
            assert space.contains(policy)
            for rung in RUNGS:
                proposals.tell(policy, rung, 1.0, 1.0, 0.0)
        assert math.isfinite(proposals._best_loss["full"])

    def test_record_entries_are_json(self, space: Space) -> None:
        record = MemoryRecord()
        run(controller(space, record, trials=2))
        assert json.loads(json.dumps(record.entries())) == record.entries()
