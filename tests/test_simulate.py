"""The search on a simulated clock: what repeats, who climbs and why, races, bad ends."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.compressors import RUNGS
from flyweight.search import driver
from flyweight.search.controller import (
    DEATHS,
    HOPELESS,
    REDUCTION,
    Budget,
    Controller,
    failures,
)
from flyweight.search.limits import Limits
from flyweight.search.pareto import EARLY, by_chance, dominates
from flyweight.search.proposals import Proposals
from flyweight.search.record import Entry, MemoryRecord
from flyweight.search.results import FINALISTS
from flyweight.search.simulate import Clock, simulate
from flyweight.search.storage import Storage
from flyweight.search.store import checkpoint_folder, remove_checkpoints
from flyweight.search.trial import competes
from flyweight.spaces import Policy

ONE: dict[str, Any] = {
    "min_keep": 1.0, "precisions": ("fp32",), "criteria": ("l1",), "reconstruct": (False,),
    "calibrations": ("minmax",), "qat": (False,), "losses": ("kl",), "temperature": (4.0, 4.0),
    "alpha": (0.9, 0.9), "learning_rate": (0.02, 0.02),
}  # fmt: skip
FEW = settings(max_examples=20)  # each is a whole search


@pytest.fixture(scope="module")
def toy(load: Callable[[str], ModuleType]) -> ModuleType:
    """A small space, its price, its results and a controller for it."""
    return load("tests/test_controller.py")


@pytest.fixture(scope="module")
def brute(load: Callable[[str], ModuleType]) -> Any:
    """Climbing and what a place gains by their definitions."""
    return SimpleNamespace(
        climbs_by_definition=load("tests/test_pareto.py").climbs_by_definition,
        area=load("tests/test_places.py").area,
    )


def controller(
    toy: ModuleType, record: MemoryRecord, clock: Clock, *, trials: int = 100, limits: Any = None,
    seconds: float | None = None, seed: int = 0, sampler: str = "random", listen: Any = (),
    **settings: Any,
) -> Controller:  # fmt: skip
    """Random search, where the sampler is not the point: it costs a tenth of TPE."""
    return Controller(
        Proposals(toy.space(**settings), sampler, seed), toy.price, limits or toy.NONE, record,
        Budget(trials, seconds), clock=clock, listen=listen,
    )  # fmt: skip


class Work:
    """What workers find: noisy, sometimes nothing; how long it takes differs by policy."""

    def __init__(self, toy: ModuleType, seed: int = 0, deaths: float = 0.0) -> None:
        self.toy, self.seed, self.deaths = toy, seed, deaths
        self.tries: Counter[tuple[str, str]] = Counter()

    def __call__(self, policy: Policy, rung: str) -> tuple[Entry | None, float]:
        rng = random.Random(f"{self.seed}/{policy.digest}/{rung}")
        seconds = rng.uniform(1.0, 9.0)
        entry = self.toy.outcome(policy, rung, seconds)
        entry["loss"] += rng.choice([0.0, 0.5, 1.0])
        self.tries[policy.digest, rung] += 1
        died = [rng.random() < self.deaths for _ in range(self.tries[policy.digest, rung])][-1]
        return (None if died else entry), seconds


def results(record: MemoryRecord) -> list[Entry]:
    return [e for e in record.entries() if e["kind"] == "result"]


def check_ends(control: Controller, record: MemoryRecord) -> None:
    """Every trial ended, after its last result, and does nothing after that unless it goes on;
    nothing is left open."""
    ended: dict[int, str] = {}
    for entry in record.entries():
        if entry["kind"] == "again":
            assert ended.pop(entry["trial"], "stopped") == "stopped"
        if entry["kind"] in ("result", "end", "died"):
            assert entry["trial"] not in ended
        if entry["kind"] == "end":
            ended[entry["trial"]] = entry["reason"]
    assert ended == {n: t.ended for n, t in control.trials.items()}
    assert control.proposals.running() == 0


@pytest.mark.parametrize("workers", [1, 7])
def test_a_seed_decides_all(toy: ModuleType, workers: int) -> None:
    records = []
    for seed in (3, 3, 4):
        clock, record = Clock(), MemoryRecord()
        control = controller(toy, record, clock, trials=40, seed=seed, sampler="tpe")
        simulate(control, Work(toy, deaths=0.1), workers, clock)
        check_ends(control, record)
        records.append(record.entries())
    assert records[0] == records[1] != records[2]


def test_one_worker_does_what_a_loop_does(toy: ModuleType) -> None:
    loop, record = MemoryRecord(), MemoryRecord()
    clock = Clock()
    toy.run(controller(toy, loop, clock, trials=30, sampler="tpe"))
    control = controller(toy, record, clock, trials=30, sampler="tpe")
    simulate(control, lambda p, r: (toy.outcome(p, r), 1.0), 1, clock)
    kept = [[e | {"time": 0} for e in each.entries()] for each in (loop, record)]
    assert kept[0] == kept[1]


@FEW
@given(st.integers(1, 9), st.integers(1, 30))
def test_workers_work(toy: ModuleType, workers: int, trials: int) -> None:
    clock, record = Clock(50.0), MemoryRecord()
    control = controller(toy, record, clock, trials=trials)
    out = simulate(control, Work(toy), workers, clock)
    assert out.busy_s == pytest.approx(sum(e["rung_seconds"] for e in results(record)))
    assert out.waited_s == out.idle == 0.0
    assert clock.now == pytest.approx(50.0 + out.seconds)
    assert out.busy_s / min(workers, trials) <= out.seconds * (1 + 1e-9) <= out.busy_s * (1 + 2e-9)
    times = [e["time"] for e in record.entries()]
    assert times == sorted(times)


@pytest.mark.parametrize("workers", [1, 5])
def test_what_the_controller_takes_passes_on_the_clock(toy: ModuleType, workers: int) -> None:
    clock, ticks, record = Clock(), itertools.count(), MemoryRecord()
    control = controller(toy, record, clock, trials=20)
    out = simulate(control, Work(toy), workers, clock, lambda: float(next(ticks)))
    again = [e for e in record.entries() if e["kind"] == "again"]
    calls = 20 + len(again) + sum(len(control.results(rung)) for rung in RUNGS)
    assert sum(out.controller_s.values()) == calls  # a second each
    if workers == 1:
        assert clock.now == pytest.approx(out.busy_s + calls)
        assert out.waited_s == calls - 1  # after the last there is nothing to wait for
    else:
        assert out.waited_s > calls / 2  # also for calls on behalf of others
    assert 0 < out.idle < 1


def check_climbs(record: MemoryRecord, limits: Limits, brute: Any, trials: int) -> None:
    """Who goes on, and who that stopped goes on later, by the entries before it alone."""
    found: list[Entry] = []
    placed: dict[str, set[int]] = {rung: set() for rung in REDUCTION}
    begun, ended = set(), {}

    def points(rung: str) -> dict[int, tuple[float, float]]:
        below = RUNGS[: RUNGS.index(rung)]
        by_luck = {e["trial"] for e in found if e["through"] == "chance" and e["rung"] in below}
        out = by_luck | {t for t, reason in ended.items() if reason == "failed"}
        some = [e for e in found if e["rung"] == rung and e["trial"] not in out]
        return {e["trial"]: toy_point(e) for e in some if e["constraint"] <= 0}

    def doomed(entry: Entry) -> bool:
        then = {e["trial"]: e["loss"] for e in found if e["rung"] == entry["rung"]}
        full = {e["trial"]: e["metric"] for e in found if e["rung"] == RUNGS[-1]}
        kept = {t: limits.teacher_metric - m <= (limits.max_drop or 0) for t, m in full.items()}
        no_worse = [t for t in full if not kept[t] and then[t] <= entry["loss"]]
        hope = [t for t in full if kept[t] and then[t] >= entry["loss"]]
        return limits.max_drop is not None and len(no_worse) >= 2 and not hope

    def most(rung: str, known: dict[int, tuple[float, float]], new: Entry | None) -> set[int]:
        """Who adds most, of those that wait on the first fronts, as many as it takes to fill the
        places."""
        last = {e["trial"]: e for e in found} | ({new["trial"]: new} if new else {})
        left, ahead = dict(known), list[int]()
        while len(ahead) < math.ceil(len(known) / REDUCTION[rung]):
            ahead += (
                on := [t for t in left if not any(dominates(q, left[t]) for q in left.values())]
            )
            left = {t: p for t, p in left.items() if t not in on}
        waiting = [
            t for t in ahead
            if (new and t == new["trial"])
            or (ended.get(t) == "stopped" and last[t]["rung"] == rung and not doomed(last[t]))
        ]  # fmt: skip

        def logs(trial: int) -> tuple[float, float]:
            return math.log(max(known[trial][0], 1e-6)), math.log(known[trial][1])

        went = [logs(t) for t in placed[rung] if t in known]
        both = [*went, *(logs(t) for t in waiting)]
        ref = max(x for x, _ in both) + 1, max(y for _, y in both) + 1
        best = max(brute.area([*went, logs(t)], ref) for t in waiting)
        return {t for t in waiting if brute.area([*went, logs(t)], ref) > best - 1e-9}

    def through(entry: Entry) -> str | None:
        rung = entry["rung"]
        if rung == RUNGS[-1] or entry["constraint"] > 0:
            return None
        others, new = points(rung), toy_point(entry)
        if rung == "short":
            known = others | {entry["trial"]: new}
            free = math.ceil(len(known) / REDUCTION[rung]) > len(placed[rung] & known.keys())
            first = most(rung, known, entry) if free else set()  # one of them, of equals
            goes = first == {entry["trial"]} or (
                entry["trial"] in first and entry["through"] == "rank"
            )
        else:
            goes = brute.climbs_by_definition(list(others.values()), new, REDUCTION[rung])
        if goes and not doomed(entry):
            placed[rung].add(entry["trial"])
            return "rank"
        return "chance" if by_chance(7, entry["trial"], entry["digest"], rung) else None

    for entry in record.entries():
        trial = entry.get("trial")
        if entry["kind"] == "begin":
            begun.add(trial)
        elif entry["kind"] == "result":
            assert entry["through"] == through(entry)
            found.append(entry)
        elif entry["kind"] == "end":
            ended[trial] = entry["reason"]
            if entry["reason"] == "failed":
                for some in placed.values():
                    some.discard(trial)
        elif entry["kind"] == "again" and ended.get(trial) == "stopped":
            last = [e for e in found if e["trial"] == trial][-1]
            rung, known = last["rung"], points(last["rung"])
            assert not doomed(last)
            place = math.ceil(len(known) / REDUCTION[rung]) > len(placed[rung] & known.keys())
            assert place or (len(begun) == trials and len(placed[rung] & known.keys()) < FINALISTS)
            assert trial in most(rung, known, None)
            placed[rung].add(trial)
            del ended[trial]


def toy_point(entry: Entry) -> tuple[float, float]:
    return entry["loss"], entry["latency_ms"][1]


@FEW
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.sampled_from([Limits(95.0), Limits(95.0, max_drop=1.0), Limits(95.0, 0.7, max_drop=1.2)]),
)
def test_who_climbs_hangs_on_the_results_so_far_alone(
    toy: ModuleType, brute: Any, seed: int, workers: int, limits: Limits
) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=40, limits=limits, seed=7)
    simulate(control, Work(toy, seed, deaths=0.05), workers, clock)
    check_ends(control, record)
    check_climbs(record, limits, brute, 40)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_at_the_end_nothing_waits_that_nobody_beats(
    toy: ModuleType, seed: int, workers: int
) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=40, seed=7)
    simulate(control, Work(toy, seed), workers, clock)
    known = {
        n: toy_point(t.results["short"]) for n, t in control.trials.items() if competes(t, "short")
    }
    ahead = {n for n, p in known.items() if not any(dominates(q, p) for q in known.values())}
    full = {n for n, t in control.trials.items() if RUNGS[-1] in t.results}
    assert ahead <= full or len(full) >= FINALISTS


def test_places_of_what_is_over_a_new_limit_are_free(toy: ModuleType) -> None:
    clock, record = Clock(), MemoryRecord()
    simulate(controller(toy, record, clock, trials=60), Work(toy), 1, clock)
    record.append({"kind": "search", "time": clock.now})
    faster = Limits(95.0, latency_ms=0.3)
    old = {e["digest"] for e in results(record)}
    again = controller(toy, record, clock, trials=100, limits=faster)
    simulate(again, Work(toy), 1, clock)
    new = [e for e in again.results(RUNGS[-1]) if e["digest"] not in old]
    assert len(new) > 3


def test_what_fails_gives_up_its_place_and_beats_nobody(toy: ModuleType) -> None:
    """The first beats all others at the short rung, and fails at the full one."""
    first: list[str] = []

    def evaluate(policy: Policy, rung: str) -> tuple[Entry, float]:
        first.append(policy.digest)
        if policy.digest != first[0]:
            return toy.outcome(policy, rung) | {"loss": 1 / toy.price(policy).latency_ms[1]}, 1.0
        if rung == RUNGS[-1]:
            return {"rung": rung, "error": "parity"}, 1.0
        return toy.outcome(policy, rung) | {"loss": -1.0}, 1.0

    def fastest_first(policy: Policy) -> Any:
        price = toy.price(policy)
        return (
            price if first and policy.digest != first[0] else replace(price, latency_ms=(0.01,) * 3)
        )

    clock = Clock()
    control = Controller(
        Proposals(toy.space(), "random", 0), fastest_first, toy.NONE, MemoryRecord(), Budget(9),
        clock=clock,
    )  # fmt: skip
    simulate(control, evaluate, 1, clock)
    assert control.trials[0].ended == "failed"
    assert len(control.results(RUNGS[-1])) > 1


@pytest.mark.parametrize("settled", [False, True])
def test_what_is_trained_no_further_takes_no_place(toy: ModuleType, settled: bool) -> None:
    """Nobody beats anybody: as many come to the full rung as a front shows, most of them only once
    no other policy is left."""

    def evaluate(policy: Policy, rung: str) -> tuple[Entry, float]:
        found = toy.outcome(policy, rung) | {"loss": 1 / toy.price(policy).latency_ms[1]}
        return found | {"settled": settled and rung != RUNGS[0]}, 1.0

    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=20)
    simulate(control, evaluate, 1, clock)
    assert len(control.results(RUNGS[-1])) == FINALISTS
    through = [e["through"] for e in results(record) if e["rung"] == "short"]
    assert (through.count("rank") == FINALISTS) == settled


def test_a_small_share_goes_on_by_chance(toy: ModuleType) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=600, sparsity=(0.0, 0.5), seed=1)
    simulate(control, Work(toy), 20, clock)
    lowest = [e for e in results(record) if e["rung"] == RUNGS[0]]
    left = [e for e in lowest if e["through"] != "rank"]
    chance = [e for e in left if e["through"] == "chance"]
    late = [e for e in left if e["trial"] >= EARLY]
    assert 0.02 < len(chance) / len(late) < 0.09  # 0.05, and three deviations
    assert all(e in late for e in chance)
    assert all(RUNGS[1] in control.trials[e["trial"]].results for e in chance)


# Races.


@FEW
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_results_of_trials_that_have_ended_change_nothing(
    toy: ModuleType, seed: int, workers: int
) -> None:
    """Nodes are lost while results of theirs are on their way, and results come twice."""
    clock, record, rng = Clock(), MemoryRecord(), random.Random(seed)
    control = controller(toy, record, clock, trials=25)
    work = Work(toy, seed, deaths=0.1)

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        lost = rng.choice(list(control.trials.values()))
        if rng.random() < 0.2:
            control.failed(lost.number, "its node is gone")
        begun = [t for t in control.trials.values() if t.results and not t.ended]
        if begun and rng.random() < 0.5:
            twice = rng.choice(begun)
            before = record.entries()
            assert control.result(twice.number, twice.results[RUNGS[0]])
            assert record.entries() == before
        ended = [t for t in control.trials.values() if t.ended]
        if ended and rng.random() < 0.5:
            late = rng.choice(ended)
            before = record.entries()
            assert not control.result(late.number, toy.outcome(late.policy, rng.choice(RUNGS)))
            assert record.entries() == before
        return work(policy, rung)

    simulate(control, evaluate, workers, clock)
    check_ends(control, record)
    assert len(control.trials) == 25


@FEW
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_trials_whose_workers_die_go_on_elsewhere(toy: ModuleType, seed: int, workers: int) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=25, seed=seed)
    work = Work(toy, seed, deaths=0.2)
    simulate(control, work, workers, clock)
    check_ends(control, record)
    assert len(control.trials) == 25
    died = Counter(e["trial"] for e in record.entries() if e["kind"] == "died")
    for trial in control.trials.values():
        tried = sum(work.tries[trial.policy.digest, rung] for rung in RUNGS)
        poisonous = trial.ended == "failed"
        assert died[trial.number] == (DEATHS - 1 if poisonous else tried - len(trial.results))
    found = [(e["trial"], e["rung"]) for e in results(record)]
    assert len(found) == len(set(found))


@FEW
@given(st.integers(0, 60), st.integers(1, 5))
def test_a_search_that_was_killed_goes_on(
    toy: ModuleType, brute: Any, calls: int, workers: int
) -> None:
    clock, record, left = Clock(), MemoryRecord(), itertools.count(calls, -1)
    work = Work(toy)

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        if next(left) == 0:
            raise KeyboardInterrupt
        return work(policy, rung)

    record.append({"kind": "search", "time": clock.now})
    try:
        simulate(controller(toy, record, clock, trials=20, seed=7), evaluate, workers, clock)
    except KeyboardInterrupt:
        record.append({"kind": "search", "time": clock.now})
    again = controller(toy, record, clock, trials=20, seed=7)
    simulate(again, work, workers, clock)
    assert len(again.trials) == 20
    assert {t.ended for t in again.trials.values()} <= {"finished", "stopped"}
    found = results(record)
    assert len({(e["trial"], e["rung"]) for e in found}) == len(found)  # no rung is repeated
    assert again.results(RUNGS[-1])
    check_ends(again, record)
    check_climbs(record, toy.NONE, brute, 20)


# Bad ends.


@pytest.mark.parametrize("fails", RUNGS)
@pytest.mark.parametrize("workers", [1, 4, 50])
def test_a_search_whose_every_trial_fails_stops_early(
    toy: ModuleType, workers: int, fails: str
) -> None:
    clock, record, reasons = Clock(), MemoryRecord(), itertools.cycle("abacbad")

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        if rung != fails:
            return toy.outcome(policy, rung), 1.0
        return {"error": f"{rung}: reason {next(reasons)}"}, 1.0

    control = controller(toy, record, clock, trials=500)
    simulate(control, evaluate, workers, clock)
    check_ends(control, record)
    assert control.hopeless()
    failed = sum(trial.ended == "failed" for trial in control.trials.values())
    assert HOPELESS <= failed <= HOPELESS + 2 * workers
    assert len(control.trials) < 500
    assert control.late() == 0.0
    told = failures(record.entries())
    assert [text for text, _ in told] == [f"{fails}: reason {r}" for r in "abc"]
    assert [n for _, n in told] == sorted((n for _, n in told), reverse=True)


def test_a_small_search_whose_every_trial_fails_is_hopeless_too(toy: ModuleType) -> None:
    for trials, narrow in ((3, {}), (100, ONE)):
        clock = Clock()
        control = controller(toy, MemoryRecord(), clock, trials=trials, **narrow)
        simulate(control, lambda *_: (None, 1.0), 4, clock)
        assert control.hopeless()


def test_one_bad_node_among_good_ones_is_no_reason_to_give_up(toy: ModuleType) -> None:
    """It fails at once, over and over, before the others have found anything."""
    clock, record, begun = Clock(), MemoryRecord(), itertools.count()

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        n = next(begun)
        if n == 0 or 40 <= n < 52:
            return {"error": "its disk is full"}, 0.5
        return toy.outcome(policy, rung), 60.0

    control = controller(toy, record, clock, trials=100)
    simulate(control, evaluate, 40, clock)
    check_ends(control, record)
    assert sum(t.ended == "failed" for t in control.trials.values()) > HOPELESS
    assert len(control.trials) == 100
    assert control.results(RUNGS[-1])


@pytest.mark.parametrize("every", [1, 3])
def test_losses_that_are_no_numbers(toy: ModuleType, every: int) -> None:
    clock, record, rng = Clock(), MemoryRecord(), random.Random(0)

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        broken = {"loss": float("nan")} if rng.random() < 1 / every else {}
        return toy.outcome(policy, rung) | broken, 1.0

    control = controller(toy, record, clock, trials=30)
    simulate(control, evaluate, 4, clock)
    check_ends(control, record)
    assert control.hopeless() == (every == 1)
    assert bool(control.results(RUNGS[-1])) == (every > 1)
    assert "the loss is nan" in failures(record.entries())[0][0]


def test_a_metric_that_is_constant(toy: ModuleType) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=60)

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        return toy.outcome(policy, rung) | {"loss": 1.0, "metric": 10.0}, 1.0

    simulate(control, evaluate, 4, clock)
    check_ends(control, record)
    assert len(control.trials) == 60
    full = control.results(RUNGS[-1])
    assert 0 < len(full) < 40
    # What is as good is better the faster it is.
    fastest = min(e["latency_ms"][1] for e in control.results(RUNGS[0]))
    assert min(e["latency_ms"][1] for e in full) == fastest


@pytest.mark.parametrize("workers", [1, 4])
def test_a_deadline_shorter_than_one_trial(toy: ModuleType, workers: int) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=100, seconds=5.0)
    out = simulate(control, lambda p, r: (toy.outcome(p, r, 10.0), 10.0), workers, clock)
    check_ends(control, record)
    assert len(control.trials) == workers  # none began after the deadline
    assert control.results(RUNGS[-1])  # and one ended with something to show
    assert out.seconds == 30.0
    assert control.late() == 25.0  # which the user is told


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("settled", [False, True])
def test_nothing_begins_that_cannot_end_in_time(
    toy: ModuleType, workers: int, settled: bool
) -> None:
    """settled: no student needs training, so that its full rung takes little."""
    took = dict(zip(RUNGS, (10.0, 10.0, 1.0 if settled else 40.0), strict=True))
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=100, seconds=300.0)

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        found = toy.outcome(policy, rung, took[rung])
        return found | {"settled": settled and rung != RUNGS[0]}, took[rung]

    out = simulate(control, evaluate, workers, clock)
    check_ends(control, record)
    assert "deadline" not in {trial.ended for trial in control.trials.values()}
    assert out.seconds <= 300.0 * 1.1
    last = max(e["time"] for e in record.entries() if e["kind"] == "begin")
    assert last >= 300.0 - (30.0 if settled else 70.0)  # nor is it given up early


def test_a_space_of_one_policy(toy: ModuleType) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(toy, record, clock, trials=100, **ONE)
    simulate(control, Work(toy), 5, clock)
    check_ends(control, record)
    assert control.exhausted
    assert [t.ended for t in control.trials.values()] == ["finished"]


@pytest.mark.parametrize("resumed", [False, True])
def test_checkpoints_are_kept_for_who_may_go_on(
    toy: ModuleType, tmp_path: Path, resumed: bool
) -> None:
    clock, record, work = Clock(), MemoryRecord(), Work(toy)
    search: Any = object.__new__(driver._Search)
    search.storage, search.janitor = Storage(tmp_path), ThreadPoolExecutor(1)
    went_on: list[bool] = []  # with its checkpoint, of those who had stopped

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        search.janitor.submit(int).result()  # what it had to remove is gone
        place = tmp_path / checkpoint_folder(policy.digest)
        own = [e for e in record.entries() if e.get("digest") == policy.digest]
        if rung == "full" and own[-1]["kind"] == "again":
            went_on.append(place.is_dir())
        elif rung == "short":
            place.mkdir(parents=True)
        return work(policy, rung)

    for trials in (100, 200) if resumed else (200,):
        search.controller = controller(toy, record, clock, trials=trials, listen=[search._tidy])
        search.waiting = driver._waiting(search.controller)
        simulate(search.controller, evaluate, 4, clock)
    search.janitor.shutdown()
    kept = {place.name for place in (tmp_path / checkpoint_folder()).iterdir()}
    may = {search.controller.trials[n].policy.digest for n in search.controller.waiting()}
    once = {e["digest"] for e in record.entries() if e["kind"] == "end" and e.get("ahead")}
    assert len(went_on) > 10
    assert all(went_on)
    assert kept <= may
    assert len(kept) < len(once)


def test_a_slow_storage_removes_no_checkpoint_of_who_went_on_since(
    toy: ModuleType, tmp_path: Path
) -> None:
    clock, record, work = Clock(), MemoryRecord(), Work(toy)
    late: list[str] = []  # whose are to be removed
    search: Any = object.__new__(driver._Search)
    search.waiting, search.storage = {}, Storage(tmp_path)
    search.janitor = SimpleNamespace(submit=lambda _, __, digest: late.append(digest))
    went_on = []  # of those who had stopped before they had a checkpoint

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        own = [e["kind"] for e in record.entries() if e.get("digest") == policy.digest]
        if rung == "short" and "again" in own:
            place = tmp_path / checkpoint_folder(policy.digest)
            place.mkdir(parents=True)
            if policy.digest in late:
                remove_checkpoints(search.storage, policy.digest)
            went_on.append(place.is_dir())
        return work(policy, rung)

    search.controller = controller(toy, record, clock, trials=200, listen=[search._tidy])
    simulate(search.controller, evaluate, 4, clock)
    assert len(went_on) > 5
    assert all(went_on)
    assert late
