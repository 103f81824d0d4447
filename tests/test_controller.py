"""The search without Ray: a record in memory, a clock and a price that a test sets."""

import itertools
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.compressors import RUNGS
from flyweight.search.controller import (
    DEATHS,
    HOPELESS,
    REFUSALS,
    UNSTORED,
    Budget,
    Controller,
    Price,
    failures,
)
from flyweight.search.ending import causes, fruitless, notes_of_end, unreached
from flyweight.search.limits import Limits
from flyweight.search.proposals import Proposals
from flyweight.search.record import Entry, MemoryRecord, ends
from flyweight.search.results import at_full
from flyweight.search.summary import Summary
from flyweight.search.trial import Trial
from flyweight.search.words import milliseconds
from flyweight.spaces import (
    BadInput,
    Capabilities,
    Group,
    Impossible,
    Layer,
    Network,
    Op,
    Policy,
    Settings,
    Space,
)

BOTH = ("fp32", "int8")
WIDTHS = {"a": 32, "b": 64}


def space(**changes: Any) -> Space:
    """A chain of two convolutions and a linear layer."""
    ops = [Op("x", "input", "x", (), "", (1, 3, 4, 4), ((None, 3),))]
    layers, before, inputs = {}, 3, "x"
    for name, width in WIDTHS.items():
        ops.append(Op(name, "conv", "Conv2d", (inputs,), name, (1, width, 4, 4), ((name, width),)))
        layers[name] = Layer(name, "conv", name, before, width, (1, 1), (1, 1), 1, name, 1, 1)
        before, inputs = width, name
    groups = {n: Group(n, w, (n,), 1) for n, w in WIDTHS.items()}
    network = Network(tuple(ops), layers, groups, ("x",), inputs)
    target = Capabilities({"conv": BOTH, "linear": BOTH}, width_multiple=8)
    return Space(network, target, Settings(**{"min_keep": 0.125, "qat": (True, False)} | changes))


class Clock:
    """Time that a test moves."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def width(policy: Policy) -> float:
    kept = sum(policy.prune.width.get(n, w) for n, w in WIDTHS.items())
    return kept / sum(WIDTHS.values())


def price(policy: Policy) -> Price:
    """Latency is the share of channels kept, a tenth less per int8 layer; zeros pack well."""
    ms = width(policy) * (1 - 0.1 * len(policy.quantize.precision))
    size = 1000 * width(policy)
    return Price((ms * 0.9, ms, ms * 1.1), int(size), int(size * (1 - 0.9 * policy.prune.sparsity)))


def outcome(policy: Policy, rung: str, seconds: float = 1.0) -> Entry:
    """A smaller student loses more; the higher the rung, the less."""
    loss = 1 / width(policy) / (1 + RUNGS.index(rung)) + policy.quantize.qat * 0.01
    loss += policy.prune.sparsity * 0.1
    cost = price(policy)
    return {
        "rung": rung, "loss": loss, "metric": 95 - loss, "size_bytes": cost.size_bytes,
        "compressed_bytes": cost.compressed_bytes, "seconds": seconds, "samples": 1,
        "artifact": None, "error": None, "rung_seconds": seconds,
    }  # fmt: skip


NONE = Limits(95.0)


def controller(
    record: Any = None, *, limits: Limits = NONE, trials: int = 12, seconds: float | None = None,
    clock: Clock | None = None, costs: Callable[[Policy], Price] = price, seed: int = 0,
    listen: Any = (), look_ahead: bool = False, longer: float | None = None, **settings: Any,
) -> Controller:  # fmt: skip
    return Controller(
        Proposals(space(**settings), seed=seed), costs, limits,
        MemoryRecord() if record is None else record, Budget(trials, seconds, longer),
        clock=clock or Clock(), listen=listen, look_ahead=look_ahead,
    )  # fmt: skip


def climb(control: Controller, trial: Trial, clock: Clock | None = None) -> None:
    """Runs one trial as far as it may go, from where it is."""
    for rung in RUNGS[len(trial.results) :]:
        if clock:
            clock.now += 1
        if not control.result(trial.number, outcome(trial.policy, rung)):
            return


def run(control: Controller, clock: Clock | None = None) -> None:
    while (trial := control.propose()) is not None:
        climb(control, trial, clock)


def kinds(record: MemoryRecord, kind: str) -> list[Entry]:
    return [e for e in record.entries() if e["kind"] == kind]


def test_a_task_that_no_worker_can_make_ends_the_search_with_one_message() -> None:
    record = MemoryRecord()
    control = controller(record)
    first, second = control.propose(), control.propose()
    assert first is not None
    assert second is not None
    for trial in (first, second):  # each worker says the same
        refused = {"rung": RUNGS[0], "refused": "task: model() fails: gone"}
        assert not control.result(trial.number, refused)
    assert control.propose() is None
    control.close()
    assert isinstance(control.fatal, BadInput)
    assert str(control.fatal) == "task: model() fails: gone"
    assert {e["reason"] for e in kinds(record, "end")} == {"interrupted"}  # both can be resumed
    assert control.proposals.running() == 0


def test_where_no_worker_can_make_the_task_any_more_the_search_ends() -> None:
    control = controller(trials=100)
    first = control.propose()
    assert first is not None
    control.result(first.number, outcome(first.policy, RUNGS[0]))
    refused = 0
    while (trial := control.propose()) is not None:
        control.result(trial.number, {"rung": RUNGS[0], "refused": "task: no file"})
        refused += 1
    assert refused == REFUSALS
    assert isinstance(control.fatal, BadInput)


def test_a_worker_that_cannot_make_the_task_where_others_did_leaves_its_trial_to_a_resume() -> None:
    record = MemoryRecord()
    control = controller(record)
    good, bad = control.propose(), control.propose()
    assert good is not None
    assert bad is not None
    control.result(good.number, outcome(good.policy, RUNGS[0]))
    assert not control.result(bad.number, {"rung": RUNGS[0], "refused": "task: no file"})
    assert control.fatal is None
    assert bad.ended == "interrupted"
    assert control.propose() is not None


def test_a_first_policy_is_not_looked_for_without_end() -> None:
    clock = Clock()

    def slow(policy: Policy) -> Price:
        clock.now += 30  # it is exported and timed
        return price(policy)

    control = controller(limits=Limits(95.0, 0.001), costs=slow, seconds=60, clock=clock)
    began = clock.now
    assert control.propose() is None
    assert control.over()
    assert not control.exhausted  # there may be some: there was no time for more
    assert 120 <= clock.now - began < 400


def test_a_first_policy_is_tried_though_finding_out_took_all_the_time() -> None:
    clock = Clock()
    control = controller(seconds=60, clock=clock)
    clock.now += 70
    assert control.propose() is not None
    assert control.propose() is None


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_whole_search_leaves_nothing_open_and_repeats_nothing(look_ahead: bool) -> None:
    record = MemoryRecord()
    control = controller(record, trials=40, look_ahead=look_ahead)
    run(control)
    control.close()
    assert sorted(control.trials) == list(range(40))
    assert len({t.policy.digest for t in control.trials.values()}) == 40
    assert {t.ended for t in control.trials.values()} == {"finished", "stopped"}
    assert control.proposals.running() == 0
    assert not control.cut_off()
    counts = [len(control.results(r)) for r in RUNGS]
    assert counts[0] == 40 > counts[1] > counts[2] > 0
    assert [e["trial"] for e in kinds(record, "begin")] == list(range(40))
    assert len(kinds(record, "end")) == 40 + len(kinds(record, "again"))


def test_the_limit_is_enforced_before_the_cost() -> None:
    record = MemoryRecord()
    control = controller(record, limits=Limits(95.0, latency_ms=0.3), trials=30)
    run(control)
    assert control.trials
    assert all(t.price.latency_ms[2] <= 0.3 for t in control.trials.values())
    rejected = kinds(record, "rejected")
    assert rejected
    assert all(e["latency_ms"][2] > 0.3 for e in rejected)
    begun = {e["digest"] for e in kinds(record, "begin")}
    assert not begun & {e["digest"] for e in rejected}
    assert control.proposals.running() == 0


def test_what_is_over_a_limit_is_made_smaller() -> None:
    control = controller(limits=Limits(95.0, latency_ms=0.4), trials=1)
    full = control.proposals.space.uniform(1.0)
    control.proposals._queue.append(full)
    trial = control.propose()
    assert trial is not None
    assert trial.policy.prune.width
    assert 0.2 < trial.price.latency_ms[1] <= 0.4  # the largest within, not the smallest there is


def test_what_is_too_large_at_every_width_is_tried_in_int8() -> None:
    def costs(policy: Policy) -> Price:
        size = int(1000 * width(policy) * (1 - 0.375 * len(policy.quantize.precision)))
        return Price(price(policy).latency_ms, size, size)

    record = MemoryRecord()
    control = controller(
        record, limits=Limits(95.0, size_bytes=200), costs=costs, trials=1, min_keep=0.5
    )
    full = control.proposals.space.uniform(1.0)
    control.proposals._queue.append(full)
    trial = control.propose()
    assert trial is not None
    assert [e["digest"] for e in kinds(record, "rejected")] == [full.digest]
    assert len(trial.policy.quantize.precision) == 2
    assert 150 < trial.price.size_bytes <= 200


def test_zeros_are_used_where_the_compressed_size_is_limited() -> None:
    def best(limits: Limits) -> Entry:
        control = controller(limits=limits, trials=60, sparsity=(0.0, 0.5, 0.75))
        run(control)
        found = [e for e in control.results("full") if e["constraint"] <= 0]
        return max(found, key=lambda e: e["metric"])

    limited = best(Limits(95.0, compressed_bytes=400))
    assert limited["compressed_bytes"] <= 400 < limited["size_bytes"]
    assert limited["policy"]["prune"]["sparsity"] > 0
    assert "sparsity" not in best(Limits(95.0)).get("prune", {})  # of no use, it only loses
    assert best(Limits(95.0, size_bytes=400))["size_bytes"] <= 400


def test_a_shrunk_policy_is_claimed_also_when_a_smaller_one_is_impossible() -> None:
    def costs(policy: Policy) -> Price:
        if 0.45 < width(policy) < 0.7:
            raise Impossible("no kernel")
        return price(policy)

    control = controller(limits=Limits(95.0, latency_ms=0.44), costs=costs, trials=25)
    run(control)
    digests = [t.policy.digest for t in control.trials.values()]
    assert len(set(digests)) == len(digests)


def test_out_of_reach_ends_without_a_trial() -> None:
    record = MemoryRecord()
    control = controller(record, limits=Limits(95.0, latency_ms=1e-6))
    assert control.propose() is None
    assert control.exhausted
    assert not control.trials
    assert control.proposals.running() == 0
    entries = record.entries()
    told = unreached(entries, Limits(95.0, latency_ms=1e-6))
    least = min(entry["latency_ms"][2] for entry in entries)
    assert told.startswith(f"of {len(entries)} the fastest takes ")
    assert f" to {milliseconds(least)} ms, the upper end of which must keep the limit of" in told
    assert "device profile of more networks" in told
    smallest = min(entry["size_bytes"] for entry in entries)
    told = unreached(entries, Limits(95.0, latency_ms=1e6, size_bytes=10))
    assert told == (
        f"of {len(entries)} the smallest has size_bytes of {smallest}, the limit is 10. "
        "Ask for less"
    )
    assert unreached([], Limits(95.0)).startswith("all that were proposed are over")


def test_looking_ahead_ends_as_cleanly() -> None:
    calls = itertools.count()

    def costs(policy: Policy) -> Price:
        if next(calls) == 5:
            raise OSError("the measuring actor died")
        return price(policy)

    control = controller(costs=costs, look_ahead=True)
    run(control)
    assert "died" in str(control.fatal)
    assert len(control.trials) == 5
    cut = controller(look_ahead=True)
    trial = cut.propose()
    assert trial is not None
    cut.close()  # with one trial running and one policy found ahead
    assert trial.ended == "interrupted"
    assert cut.proposals.running() == 0


def test_an_impossible_policy_is_rejected_with_its_reason() -> None:
    def costs(policy: Policy) -> Price:
        if policy.quantize.acts:
            raise Impossible("no int8 here")
        return price(policy)

    record = MemoryRecord()
    run(controller(record, costs=costs))
    assert {e["reason"] for e in kinds(record, "rejected")} == {"no int8 here"}


def test_what_nobody_foresaw_of_a_policy_costs_that_one_alone() -> None:
    def costs(policy: Policy) -> Price:
        if policy.quantize.acts:
            raise IndexError("list index out of range")
        return price(policy)

    record = MemoryRecord()
    control = controller(record, costs=costs, limits=Limits(95.0, latency_ms=0.5))
    run(control)
    assert control.trials
    told = {e["reason"] for e in kinds(record, "rejected") if "latency_ms" not in e}
    assert told == {"IndexError: list index out of range"}


def test_a_search_that_can_price_nothing_says_why() -> None:
    def costs(_: Policy) -> Price:
        raise IndexError("list index out of range")

    record = MemoryRecord()
    control = controller(record, costs=costs)
    run(control)
    assert control.exhausted
    told = unreached(record.entries(), control.limits)
    assert re.fullmatch(
        r"none has a price, (\d+) of \1 because of: IndexError: list index out of range", told
    )


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize(("method", "right"), [("ask", 3), ("tell", 8), ("fail", 4)])
def test_what_nobody_foresaw_of_proposing_ends_the_search_with_what_there_is(
    method: str, right: int, look_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = controller(look_ahead=look_ahead)
    proper, calls = getattr(control.proposals, method), itertools.count()

    def called(*given: Any) -> Any:
        return {}["gone"] if next(calls) >= right else proper(*given)

    monkeypatch.setattr(control.proposals, method, called)
    run(control)
    assert str(control.fatal) == "KeyError: 'gone'"
    assert control.results("full")


def test_the_deadline_drains() -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(record, seconds=20.0, trials=1000, clock=clock)
    run(control, clock)
    assert 3 <= len(control.trials) < 20
    assert control.elapsed() <= 20 + 3 + 0.1 * 20
    assert control.results("full")
    assert all(t.ended for t in control.trials.values())


def test_a_budget_is_spent_once_nothing_could_end_in_the_rest() -> None:
    clock = Clock()
    control = controller(seconds=20.0, trials=1000, clock=clock)
    assert control.spent_s() is None
    run(control, clock)
    assert control.spent_s() == 20.0
    control.interrupted = True  # what was stopped by hand could have gone on
    assert control.spent_s() is None


def test_what_is_trained_no_more_is_no_measure_of_what_is() -> None:
    clock = Clock()
    control = controller(seconds=1000.0, trials=10, clock=clock)

    def climb(loss: float, settled: bool, full_s: float, short_s: float = 1.0) -> str | None:
        trial = control.propose()
        assert trial is not None
        for rung, seconds in zip(RUNGS, (1.0, short_s, full_s), strict=True):
            clock.now += seconds
            found = outcome(trial.policy, rung, 1.0) | {"loss": loss, "metric": 95 - loss}
            found["rung_seconds"] = full_s if rung == RUNGS[-1] else 1.0
            found["settled"] = settled and rung != RUNGS[0]
            if not control.result(trial.number, found):
                break
        return trial.ended

    for loss in (0.99, 0.95, 0.9):  # the more part
        assert climb(loss, True, 1.0) == "finished"
    assert climb(0.8, False, 300.0) == "finished"
    assert climb(0.7, True, 1.0, short_s=500.0) == "finished"
    assert control.propose() is None  # 187 s are left: what was trained took longer


def test_one_trial_runs_if_what_came_before_took_all_the_time() -> None:
    clock, record = Clock(), MemoryRecord()
    record.append({"kind": "search", "time": clock.now})
    clock.now += 30.0  # the profile and the table
    control = controller(record, seconds=20.0, trials=1000, clock=clock)
    run(control, clock)
    assert len(control.trials) == 1
    assert len(control.results("full")) == 1


def test_what_trials_leave_of_the_time_is_known() -> None:
    for trials, expected in ((3, 1000.0), (1000, 0.0)):
        clock = Clock()
        control = controller(seconds=1000.0, trials=trials, clock=clock)
        run(control, clock)
        assert control.unused_s() == pytest.approx(expected, rel=0.1)
        notes = "\n".join(notes_of_end(control, nothing_left=False))
        for name in ("search.trials", "rungs.full_epochs"):  # what would use it
            assert (name in notes) == (expected > 0), notes


def test_of_those_that_the_deadline_meets_before_any_finished_one_goes_on() -> None:
    clock = Clock()
    control = controller(seconds=20.0, trials=4, clock=clock)
    trials = [control.propose() for _ in range(4)]
    for rung in RUNGS[:2]:
        for trial in trials:
            assert trial is not None
            clock.now += 6.0 if rung == RUNGS[1] else 0.0
            loss = 1.0 - clock.now - trial.number  # each is better than those before
            control.result(trial.number, outcome(trial.policy, rung) | {"loss": loss})
    ends = [trial.ended for trial in trials if trial]
    assert len(control.results("short")) == 4
    assert sorted(map(str, ends)) == ["None", "stopped", "stopped", "stopped"]


def test_a_trial_whose_end_a_kill_cut_off_has_ended() -> None:
    """Its last result is in the record, that it ended is not."""
    record, cut = MemoryRecord(), MemoryRecord()
    run(controller(record, trials=3))
    whole = ends(record.entries())
    for entry in record.entries():
        if not (entry["kind"] == "end" and entry["reason"] == "finished"):
            cut.append(entry)
    assert ends(cut.entries()).keys() < whole.keys()
    controller(cut, trials=3)
    assert {n: e["reason"] for n, e in ends(cut.entries()).items()} == {
        n: e["reason"] for n, e in whole.items()
    }


def test_a_search_that_only_fails_ends() -> None:
    record = MemoryRecord()
    control = controller(record, trials=100)
    while (trial := control.propose()) is not None:
        control.result(trial.number, {"rung": RUNGS[0], "error": "boom\nmore"})
    assert control.hopeless()
    assert len(control.trials) == HOPELESS
    assert failures(record.entries()) == [("boom", HOPELESS)]
    assert control.proposals.running() == 0


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_figures_that_are_no_numbers_fail_the_trial_alone(name: str) -> None:
    record = MemoryRecord()
    control = controller(record)
    trial = control.propose()
    assert trial is not None
    broken = outcome(trial.policy, RUNGS[0]) | {name: float("nan")}
    assert not control.result(trial.number, broken)
    assert trial.ended == "failed"
    assert "nan" in kinds(record, "end")[0]["error"]
    assert control.propose() is not None


def test_late_and_foreign_results_are_ignored() -> None:
    record = MemoryRecord()
    control = controller(record)
    trial = control.propose()
    assert trial is not None
    control.failed(trial.number, "its worker died")
    before = record.entries()
    assert not control.result(trial.number, outcome(trial.policy, RUNGS[0]))
    assert not control.result(99, outcome(trial.policy, RUNGS[0]))
    control.failed(trial.number, "again")
    control.failed(99, "unknown")
    control.close()
    assert record.entries() == before


class FullDisk(MemoryRecord):
    """Takes so many entries and no more."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def append(self, entry: Entry) -> None:
        if len(self._entries) >= self.room:
            raise OSError(28, "No space left on device")
        super().append(entry)


@pytest.mark.parametrize("room", range(12))
def test_a_record_that_cannot_be_written_ends_the_search(room: int) -> None:
    heard: list[Entry] = []
    control = controller(FullDisk(room), listen=[heard.append])
    run(control)
    control.close()
    assert isinstance(control.fatal, OSError)
    assert control.propose() is None
    assert not control.cut_off()  # an error, not an interruption
    written = [(e["kind"], e["digest"]) for e in control.record.entries()]
    assert [(e["kind"], e["digest"]) for e in heard] == written


@pytest.mark.parametrize("room", range(12))
def test_tune_is_told_that_nothing_comes_any_more(room: int) -> None:
    """Else it would wait for ever for trials that could not be ended."""
    from flyweight.search.tuning import ControlledSearcher

    control = controller(FullDisk(room))
    searcher = ControlledSearcher(control)
    asked = 0
    while searcher.suggest(f"id{asked}") != ControlledSearcher.FINISHED:
        asked += 1
        assert asked <= 12
        climb(control, control.trials[len(control.trials) - 1])
    assert control.fatal


def test_a_ctrl_c_while_the_first_policy_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune's handler restores the one before it, and is gone when ``propose`` returns."""
    from flyweight.search.tuning import ControlledSearcher

    control, before = controller(), signal.getsignal(signal.SIGINT)

    def interrupted(_: float) -> None:
        signal.signal(signal.SIGINT, before)

    monkeypatch.setattr(control, "propose", interrupted)
    monkeypatch.setattr(control, "looking", lambda: True)
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        assert ControlledSearcher(control).suggest("id") == ControlledSearcher.FINISHED
    finally:
        signal.signal(signal.SIGINT, before)


def test_failures_are_told_where_they_left_a_search_with_nothing() -> None:
    def end(reason: str) -> Entry:
        return {"kind": "end", "reason": reason, "error": "boom"}

    begin, failed, late = {"kind": "search"}, end("failed"), end("deadline")
    assert causes([begin, failed, failed], hopeless=False) == [("boom", 2)]
    assert causes([begin, failed, late], hopeless=False) == [("boom", 1)]
    assert causes([begin, failed, begin], hopeless=False) == []
    assert causes([begin, failed, begin, late], hopeless=False) == []
    assert causes([begin, late, begin, failed], hopeless=False) == [("boom", 1)]
    assert causes([begin, failed, begin], hopeless=True) == [("boom", 1)]


def searched() -> list[Entry]:
    clock, record = Clock(), MemoryRecord()
    record.append({"kind": "search", "time": clock.now})
    run(controller(record, limits=Limits(95.0, latency_ms=0.6), clock=clock), clock)
    return record.entries()


WHOLE = searched()


@given(st.integers(1, len(WHOLE)), st.booleans())
def test_any_prefix_of_a_record_goes_on_without_repeating(cut: int, announced: bool) -> None:
    kept = WHOLE[:cut]
    clock = Clock(5000.0)
    record = MemoryRecord([*kept, {"kind": "search", "time": clock.now}])
    control = controller(record, limits=Limits(95.0, latency_ms=0.6), clock=clock)
    last = {e["trial"]: e for e in kept if e["kind"] in ("begin", "again", "end")}
    ended = {trial for trial, e in last.items() if e["kind"] == "end"}
    # A full result ends its trial, though the entry that says so was cut off.
    ended |= {e["trial"] for e in kept if e.get("rung") == RUNGS[-1]}
    digests = {e["digest"] for e in kept if e["kind"] in ("begin", "rejected")}
    assert control.elapsed() == kept[-1]["time"] - kept[0]["time"]
    assert {n for n, t in control.trials.items() if t.ended} == ended
    known = set(control.trials)
    if announced:
        control.close()  # as an interrupted session does: they begin again all the same
        control = controller(record, limits=Limits(95.0, latency_ms=0.6), clock=clock)
    again: list[int] = []
    while (trial := control.propose()) is not None:
        again.append(trial.number)
        if trial.number in ended:
            assert last[trial.number]["reason"] == "stopped"  # there is a place for it by now
        assert trial.number in known or trial.policy.digest not in digests
        climb(control, trial, clock)
    assert known - ended <= set(again)
    results = [(e["trial"], e["rung"]) for e in kinds(record, "result")]
    assert len(results) == len(set(results))  # no rung that was finished is repeated
    assert sorted(control.trials) == list(range(12))
    assert all(t.ended for t in control.trials.values())
    assert control.proposals.running() == 0


@pytest.mark.parametrize("size_bytes", [100, 10_000])
def test_an_end_that_was_cut_off_says_what_it_would_have_said(size_bytes: int) -> None:
    record, limits = MemoryRecord(), Limits(95.0, size_bytes=1000)
    control = controller(record, limits=limits, trials=1)
    trial = control.propose()
    assert trial is not None
    for rung in RUNGS:  # how large its artifact is shows when it is built
        size = {"size_bytes": size_bytes} if rung == RUNGS[-1] else {}
        control.result(trial.number, outcome(trial.policy, rung) | size)
    *kept, end = record.entries()
    assert end["reason"] == ("finished" if size_bytes <= 1000 else "over_limit")
    cut = MemoryRecord(kept)
    resumed = controller(cut, limits=limits, trials=1)
    assert [e["reason"] for e in kinds(cut, "end")] == [end["reason"]]
    assert resumed.trials[0].ended == end["reason"]


def test_a_record_is_read_once() -> None:
    class Counted(MemoryRecord):
        read = 0

        def entries(self) -> list[Entry]:
            self.read += 1
            return super().entries()

    record = Counted([e for e in WHOLE if e["kind"] != "end"])
    controller(record)
    assert record.read == 1


def test_what_an_earlier_session_left_counts_as_running_once_it_goes_on() -> None:
    record = MemoryRecord()
    first = controller(record, trials=2)
    for _ in range(2):
        assert first.propose() is not None
    first.close()
    record.append({"kind": "search", "time": 0.0})
    seen = Summary()
    for entry in record.entries():
        seen.add(entry)
    resumed = controller(record, trials=2, listen=[seen.add])
    assert seen.state().startswith("0 running")
    for count in (1, 2):
        assert resumed.propose() is not None
        assert seen.state().startswith(f"{count} running")
        assert len(resumed.running()) == count


@given(st.integers(1, len(WHOLE)))
def test_the_same_record_gives_the_same_next_decision(cut: int) -> None:
    twins = [controller(MemoryRecord(WHOLE[:cut]), trials=50, seed=3) for _ in range(2)]
    for _ in range(3):
        a, b = (c.propose() for c in twins)
        assert (a and a.policy) == (b and b.policy)


def test_elapsed_adds_up_over_sessions_and_leaves_out_the_time_between() -> None:
    entries: list[Entry] = []
    for begin, spent in ((0.0, 5.0), (100.0, 7.0), (900.0, 0.0)):
        entries.append({"kind": "search", "time": begin})
        if spent:
            entries.append(
                {"kind": "rejected", "policy": Policy().to_dict(), "time": begin + spent}
            )
            entries.append({"kind": "measured", "time": begin + 60})  # by `flyweight measure`, say
    clock = Clock(900.0)
    control = controller(MemoryRecord(entries), clock=clock, seconds=20.0)
    assert control.elapsed() == 12.0
    clock.now += 3
    assert control.remaining() == 5.0


def test_trials_that_wait_for_a_spent_budget_are_no_interruption() -> None:
    entries = [e for e in WHOLE if e["kind"] != "end" or e["trial"] != 0]
    clock = Clock(5000.0)
    control = controller(
        MemoryRecord([*entries, {"kind": "search", "time": clock.now}]), clock=clock, seconds=1.0
    )
    assert control.propose() is None
    assert not control.cut_off()


def test_a_running_trial_is_an_interruption() -> None:
    control = controller(trials=1)
    trial = control.propose()
    assert control.cut_off()
    control.close()
    assert trial is not None
    assert trial.ended == "interrupted"
    assert not control.cut_off()


def test_concurrent_trials_in_any_order() -> None:
    control = controller(trials=30)
    running: list[tuple[Trial, Any]] = []
    for step in itertools.count():
        while len(running) < 4 and (trial := control.propose()) is not None:
            running.append((trial, iter(RUNGS)))
        if not running:
            break
        at = step * 7 % len(running)
        trial, rungs = running[at]
        if not control.result(trial.number, outcome(trial.policy, next(rungs))):
            running.pop(at)
    assert all(t.ended for t in control.trials.values())
    assert control.proposals.running() == 0


def test_a_changed_limit_judges_what_is_known_anew() -> None:
    record = MemoryRecord()
    strict = Limits(95.0, latency_ms=0.4)
    run(controller(record, limits=strict))
    known = {e["digest"]: e for e in kinds(record, "result") if e["rung"] == "full"}
    loose = Limits(95.0, latency_ms=0.9, max_drop=0.5)
    after = controller(record, limits=loose)
    for entry in after.results("full"):
        excess = loose.excess(
            entry["metric"], entry["latency_ms"][1], entry["size_bytes"], entry["compressed_bytes"]
        )
        assert entry["constraint"] == excess
        assert entry["digest"] in known
    assert any(e["constraint"] > 0 for e in after.results("full"))  # now over max_drop
    assert after.over()  # the trials it may have were had: nothing is trained again


def test_what_an_old_limit_rejected_may_be_proposed_under_a_new_one() -> None:
    record = MemoryRecord()
    run(controller(record, limits=Limits(95.0, latency_ms=0.3), trials=3))
    rejected = [Policy.from_dict(e["policy"]) for e in kinds(record, "rejected")]
    assert rejected
    strict = controller(record, limits=Limits(95.0, latency_ms=0.3), trials=20)
    assert not any(strict.proposals.claim(policy) for policy in rejected)
    loose = controller(record, limits=Limits(95.0, latency_ms=2.0), trials=20)
    assert all(loose.proposals.claim(policy) for policy in rejected)


def test_what_comes_before_the_trials_of_a_session_is_part_of_its_time() -> None:
    clock = Clock()
    record = MemoryRecord([{"kind": "search", "time": clock.now}])
    clock.now += 30  # a profile, a table
    control = controller(record, clock=clock, seconds=100)
    assert control.elapsed() == 30
    assert control.remaining() == 70


def test_a_changed_target_prices_what_is_known_anew() -> None:
    record = MemoryRecord()
    run(controller(record, limits=Limits(95.0, latency_ms=0.6)))

    def slower(policy: Policy) -> Price:
        known = price(policy)
        return replace(known, latency_ms=tuple(2 * ms for ms in known.latency_ms))

    limits = Limits(95.0, latency_ms=0.6)
    after = Controller(
        Proposals(space()), slower, limits, record, Budget(12), clock=Clock(), reprice=True
    )
    for entry in after.results("full"):
        policy = Policy.from_dict(entry["policy"])
        assert entry["latency_ms"] == list(slower(policy).latency_ms)
    assert any(e["constraint"] > 0 for e in after.results("full"))
    # Who reads the record knows the same of each artifact.
    now = {e["digest"]: e["latency_ms"] for e in at_full(record.entries())}
    assert now == {e["digest"]: e["latency_ms"] for e in after.results("full")}
    told = len(kinds(record, "priced"))
    assert told == len(now)
    for how in (True, False):  # the same target again, also where nothing predicts any more
        later = Controller(
            Proposals(space()), slower, limits, record, Budget(12), clock=Clock(), reprice=how
        )
        assert later.results("full") == after.results("full")
    assert len(kinds(record, "priced")) == told


def test_a_trial_whose_worker_died_goes_on_from_its_last_rung() -> None:
    record = MemoryRecord()
    control = controller(record, trials=1)
    trial = control.propose()
    assert trial is not None
    assert trial.next_rung == "recalibrate"
    assert control.result(trial.number, outcome(trial.policy, "recalibrate"))
    assert control.result(trial.number, outcome(trial.policy, "short"))
    assert control.running() == [trial]
    assert control.propose() is None  # no more than one, but this one may come back
    control.died(trial.number, "killed")
    assert not control.running()
    assert not control.over()
    control.died(trial.number, "told twice")
    assert control.propose() is trial
    assert trial.next_rung == "full"
    assert control.running() == [trial]
    climb(control, trial)
    assert trial.ended == "finished"
    assert control.propose() is None
    assert not control.running()
    assert not control.cut_off()
    assert [e["kind"] for e in record.entries()] == [
        "begin", "result", "result", "died", "again", "result", "end",
    ]  # fmt: skip
    assert [e["rung"] for e in kinds(record, "result")] == list(RUNGS)
    assert control.proposals.running() == 0


@pytest.mark.parametrize("resumed", [False, True])
def test_a_policy_on_which_workers_die_is_poisonous(resumed: bool) -> None:
    record = MemoryRecord()
    control = controller(record, trials=20)
    for death in range(DEATHS):
        if resumed and death:
            control = controller(record, trials=20)
        first = control.propose()
        assert first is not None
        assert first.number == 0
        control.died(0, f"death {death}")
    run(control)
    assert control.trials[0].ended == "failed"
    (end,) = (e for e in kinds(record, "end") if e["trial"] == 0)
    assert "poisonous" in end["error"]
    assert f"death {DEATHS - 1}" in end["error"]
    assert len(kinds(record, "died")) == DEATHS - 1
    assert [e["digest"] for e in kinds(record, "begin")].count(first.policy.digest) == 1
    later = controller(record, trials=40)
    run(later)
    assert [e["digest"] for e in kinds(record, "begin")].count(first.policy.digest) == 1
    assert later.proposals.running() == 0


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("lost", "often"), [("node", 8), ("preempted", 30)])
def test_nodes_that_are_lost_are_hardly_the_fault_of_a_policy(
    lost: str, often: int, resumed: bool
) -> None:
    record = MemoryRecord()
    control = controller(record, trials=1)
    for loss in range(often):
        trial = control.propose()
        assert trial is not None, f"{loss} lost"
        control.died(0, "gone", lost)
        if resumed:
            control = controller(record, trials=1)
    if lost == "preempted":
        run(control)
        assert control.trials[0].ended == "finished"
    else:  # it may be what takes them along
        assert control.propose() is None
        assert control.trials[0].ended == "failed"


def unstored(policy: Policy, rung: str) -> Entry:
    """What a worker says whose disk is full."""
    if rung == RUNGS[-1]:
        return {"rung": rung, "unstored": f"{rung}: no space left"}
    return outcome(policy, rung)


def test_a_result_that_could_not_be_stored_is_had_again() -> None:
    record, full = MemoryRecord(), [True] * (UNSTORED - 1)
    control = controller(record, trials=12)

    def step(trial: Trial) -> Entry:
        rung = trial.next_rung
        found = (unstored if rung == RUNGS[-1] and full else outcome)(trial.policy, rung)
        if "unstored" in found:
            full.pop()
        return found

    while trial := control.propose():
        while control.result(trial.number, step(trial)):
            pass
    assert not full
    assert control.fatal is None
    assert {t.ended for t in control.trials.values()} <= {"finished", "stopped", "over_limit"}
    assert len(control.trials) == 12


def test_a_search_whose_results_cannot_be_stored_ends_and_can_be_gone_on_with() -> None:
    record = MemoryRecord()
    control = controller(record, trials=12)
    while trial := control.propose():
        while control.result(trial.number, unstored(trial.policy, trial.next_rung)):
            pass
    control.close()
    assert "no space left" in str(control.fatal)
    assert "failed" not in {t.ended for t in control.trials.values()}
    later = controller(record, trials=12)
    run(later)
    assert len(later.trials) == 12
    assert later.results(RUNGS[-1])
    rungs = [(e["trial"], e["rung"]) for e in kinds(record, "result")]
    assert len(rungs) == len(set(rungs))


def test_a_worker_that_dies_when_the_time_is_up_interrupts_its_trial() -> None:
    clock, record = Clock(), MemoryRecord()
    record.append({"kind": "search", "time": clock.now})
    control = controller(record, clock=clock, seconds=5.0)
    first = control.propose()
    assert first is not None
    climb(control, first)
    trial = control.propose()
    assert trial is not None
    control.result(trial.number, outcome(trial.policy, "recalibrate") | {"loss": 0.0})
    clock.now += 6
    control.died(trial.number, "killed")
    assert control.propose() is None
    assert not control.running()
    assert not control.cut_off()
    control.close()
    assert trial.ended == "interrupted"  # with more time a later session goes on with it
    again = controller(record, clock=clock, seconds=60.0)
    found = again.propose()
    assert found is not None
    assert (found.number, found.next_rung) == (trial.number, "short")


def test_the_only_trial_goes_on_though_its_worker_dies_when_the_time_is_up() -> None:
    clock = Clock()
    control = controller(clock=clock, seconds=5.0)
    trial = control.propose()
    assert trial is not None
    control.result(trial.number, outcome(trial.policy, "recalibrate"))
    clock.now += 6
    control.died(trial.number, "killed")
    assert control.propose() is trial
    climb(control, trial)
    assert control.results("full")


@pytest.mark.parametrize("late", [False, True])
def test_where_the_last_hope_fails_the_next_goes_on_past_the_deadline(late: bool) -> None:
    clock, record = Clock(), MemoryRecord()
    control = controller(record, seconds=10.0, trials=4, clock=clock)
    trials = [trial for _ in range(4) if (trial := control.propose())]
    for trial, loss in zip(trials, (4.0, 3.0, 2.0, 1.0), strict=True):
        assert control.result(trial.number, outcome(trial.policy, "recalibrate") | {"loss": loss})
    clock.now += 11.0
    for trial, loss in zip(trials[:3], (3.0, 2.0, 1.0), strict=True):
        control.result(trial.number, outcome(trial.policy, "short") | {"loss": loss})
    last, worse, better, other = trials
    assert (worse.ended, better.ended) == ("stopped", "stopped")
    control.result(other.number, {"rung": "short", "error": "boom"})
    assert control.propose() is None  # one goes on already
    clock.now += 20.0 if late else 1.0
    control.result(last.number, {"rung": "full", "error": "parity"})
    if late:  # no more than as much time again
        assert control.propose() is None
    else:
        assert control.propose() is better
        assert control.propose() is None
        climb(control, better)
        assert better.ended == "finished"
        assert control.propose() is None
        assert worse.ended == "stopped"
    control.close()
    told = [] if not late else [("parity", 1), ("boom", 1)]
    assert sorted(fruitless(control)) == sorted(told)


def test_a_search_whose_time_is_spent_goes_on_with_nothing() -> None:
    clock, record = Clock(), MemoryRecord()
    record.append({"kind": "search", "time": clock.now})
    control = controller(record, seconds=10.0, clock=clock)
    trial = control.propose()
    assert trial is not None
    control.result(trial.number, outcome(trial.policy, "recalibrate"))
    clock.now += 11
    control.close()
    record.append({"kind": "search", "time": clock.now})
    assert controller(record, seconds=10.0, clock=clock).propose() is None
    assert controller(record, seconds=20.0, clock=clock).propose() is not None


def test_before_any_finished_the_short_rung_says_how_long_a_full_one_takes() -> None:
    clock = Clock()
    control = controller(seconds=100.0, trials=5, clock=clock, longer=9.0)
    trials = [trial for _ in range(5) if (trial := control.propose())]
    for trial in trials:
        loss = {"loss": -float(trial.number)}
        assert control.result(trial.number, outcome(trial.policy, "recalibrate") | loss)
    clock.now += 90
    for trial in trials:
        loss = {"loss": -float(trial.number)}
        control.result(trial.number, outcome(trial.policy, "short", 90.0) | loss)
    assert [trial.ended for trial in trials] == [None, *["stopped"] * 3, "deadline"]


def test_what_an_earlier_session_left_is_not_begun_when_there_is_no_time_for_it() -> None:
    left = [e | {"rung_seconds": 100.0} for e in WHOLE if e["kind"] != "end"]
    clock = Clock(5000.0)
    record = MemoryRecord([*left, {"kind": "search", "time": clock.now}])
    control = controller(record, clock=clock, seconds=WHOLE[-1]["time"] - WHOLE[0]["time"] + 50)
    waiting = {t.number for t in control.trials.values() if not t.ended and t.results}
    assert waiting
    assert control.propose() is None  # as many trials as there may be have begun
    ended = {t.number for t in control.trials.values() if t.ended == "deadline"}
    assert ended == waiting


class Gated(Proposals):
    """Lets a test decide when a proposal is made."""

    def __init__(self) -> None:
        super().__init__(space())
        self.gate, self.asked = threading.Event(), threading.Event()

    def ask(self) -> Policy | None:
        assert self.gate.wait(60)
        found = super().ask()
        self.asked.set()
        return found


class NewAlone(Controller):
    """Nothing that stopped goes on: every proposal is a new policy."""

    def _climber(self) -> None:
        return None


def test_what_is_proposed_does_not_hang_on_how_long_proposing_takes() -> None:
    def proposed(quick: bool) -> list[str]:
        proposals = Gated()
        proposals.gate.set()
        control = NewAlone(
            proposals, price, NONE, MemoryRecord(), Budget(40), clock=Clock(), look_ahead=True
        )
        out = []
        trial = control.propose()
        while trial is not None:
            out.append(trial.policy.digest)
            if quick:  # the next is known before there is any result of this one
                assert len(out) == 40 or proposals.asked.wait(60)
            climb(control, trial)
            proposals.gate.set()
            proposals.asked.clear()
            trial = control.propose() if quick else _held(control, proposals)
        control.close()
        return out

    def _held(control: Controller, proposals: Gated) -> Trial | None:
        """The next trial; the one after it is not looked for until there are results."""
        found = control.propose()
        proposals.gate.clear()
        return found

    assert proposed(True) == proposed(False)


def test_results_do_not_wait_for_a_policy_that_is_looked_for() -> None:
    proposals, record = Gated(), MemoryRecord()
    control = Controller(
        proposals, price, NONE, record, Budget(3), clock=Clock(), look_ahead=True
    )  # fmt: skip
    assert control.propose(0.0) is None  # it may take long: its target is away, say
    assert control.looking()
    proposals.gate.set()
    first = control.propose()
    assert first is not None
    proposals.asked.wait(60)
    proposals.gate.clear()
    second = control.propose()
    assert second is not None
    assert control.propose(0.01) is None
    assert control.looking()
    climb(control, first)
    assert first.ended
    climb(control, second)
    proposals.gate.set()
    third = control.propose()
    assert third is not None
    assert third.number == 2
    assert not control.looking()  # there are to be no more
    control.close()
    assert proposals.running() == 0


def test_what_is_proposed_does_not_hang_on_what_comes_in_while_it_is_looked_for() -> None:
    class OneByOne(Proposals):
        passes = threading.Semaphore(0)

        def ask(self) -> Policy | None:
            assert self.passes.acquire(timeout=60)
            return super().ask()

    def proposed(before: bool) -> list[str]:
        """before: the results of the trial before come in while the next is looked for."""
        proposals = OneByOne(space())
        control = NewAlone(
            proposals, price, NONE, MemoryRecord(), Budget(40), clock=Clock(), look_ahead=True
        )
        out: list[Trial] = []
        while len(out) < 40:
            if before and out:
                assert control.propose(0.0) is None
                climb(control, out[-1])
            proposals.passes.release()
            trial = control.propose()
            assert trial is not None
            if not before and out:
                climb(control, out[-1])
            out.append(trial)
        control.close()
        return [trial.policy.digest for trial in out]

    assert proposed(True) == proposed(False)


def test_a_search_ends_though_a_policy_is_still_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyweight.search.finder.CLOSE_S", 0.01)
    gate, priced = threading.Event(), threading.Event()

    def costs(policy: Policy) -> Price:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(60)
            priced.set()
        return price(policy)

    control = controller(costs=costs, look_ahead=True)
    assert control.propose(0.0) is None
    control.close()
    gate.set()
    assert priced.wait(60)  # what was asked for is found, and nobody wants it
    assert not control.trials
    assert not kinds(control.record, "begin")  # type: ignore[arg-type]  # it is a MemoryRecord


def test_a_search_that_ends_prices_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each policy is timed, and models are slow, a price takes a while."""
    monkeypatch.setattr("flyweight.search.finder.CLOSE_S", 60.0)
    first, goes_on, priced = threading.Event(), threading.Event(), []

    def costs(policy: Policy) -> Price:
        priced.append(policy)
        if len(priced) == 2:  # a smaller form of the first, which is over the limit
            first.set()
            assert goes_on.wait(60)
        return price(policy)

    control = controller(costs=costs, look_ahead=True, limits=Limits(95.0, latency_ms=1e-6))
    assert control.propose(0.0) is None
    assert first.wait(60)
    closing = threading.Thread(target=control.close)
    closing.start()
    while not control._finder._closed:
        threading.Event().wait(0.001)
    goes_on.set()
    closing.join(60)
    assert len(priced) == 2


def test_a_form_that_is_made_smaller_is_not_priced_on_past_the_deadline() -> None:
    clock, priced = Clock(), []

    def slow(policy: Policy) -> Price:
        clock.now += 3
        priced.append(policy)
        return price(policy)

    control = controller(clock=clock, seconds=5.5, limits=Limits(95.0, latency_ms=0.01), costs=slow)
    assert control.propose() is None
    assert len(priced) == 4  # as much time again, for the first


def test_what_came_in_may_teach_where_the_limits_are_kept() -> None:
    good = [space().uniform(keep, "int8") for keep in (0.5, 0.25)]

    class Taught(Proposals):
        given, known = 0, 1

        def ask(self) -> Policy | None:
            if self.given == self.known:
                return super().ask()
            self.given += 1
            self.claim(good[self.given - 1])
            return good[self.given - 1]

        def tell(self, *result: Any) -> None:
            super().tell(*result)
            self.known = 2

    def costs(policy: Policy) -> Price:
        ms = 0.5 if policy in good[: proposals.given] else 2.0
        return Price((ms, ms, ms), 1, 1)

    proposals, limits = Taught(space(), "random"), Limits(95.0, latency_ms=1.0)
    control = Controller(proposals, costs, limits, MemoryRecord(), Budget(9), clock=Clock())
    trial = control.propose()
    assert trial is not None
    assert control.propose() is None
    assert control.exhausted
    climb(control, trial)
    second = control.propose()
    assert second is not None
    assert second.policy == good[1]


def test_what_was_too_large_is_not_priced_again() -> None:
    record, limits = MemoryRecord(), Limits(95.0, size_bytes=300)
    run(controller(record, limits=limits, trials=3))
    large = [e["digest"] for e in kinds(record, "rejected") if e["size_bytes"] > 300]
    assert large
    priced = []

    def counted(policy: Policy) -> Price:
        priced.append(policy.digest)
        return price(policy)

    after = Controller(
        Proposals(space()), counted, limits, record, Budget(3), clock=Clock(), reprice=True
    )
    assert not {*large} & {*priced}
    assert {t.policy.digest for t in after.trials.values()} <= {*priced}


def test_tune_asks_again_while_a_policy_is_looked_for_until_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flyweight.search import tuning

    monkeypatch.setattr(tuning, "IDLE_S", 0.01)
    proposals = Gated()
    control = Controller(
        proposals, price, NONE, MemoryRecord(), Budget(3), clock=Clock(), look_ahead=True
    )
    searcher = tuning.ControlledSearcher(control)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # as Tune does
    try:
        assert searcher.suggest("a") is None
        assert searcher.suggest("a") is None
        signal.signal(signal.SIGINT, before)  # as its handler does
        assert searcher.suggest("a") == tuning.ControlledSearcher.FINISHED
        assert control.cut_off()
    finally:
        signal.signal(signal.SIGINT, before)
        proposals.gate.set()
        control.close()


def test_with_more_time_what_the_deadline_ended_goes_on() -> None:
    clock = Clock()
    record = MemoryRecord([{"kind": "search", "time": clock.now}])
    control = controller(record, seconds=20.0, trials=1000, clock=clock)
    first = control.propose()
    late = control.propose()
    assert first is not None
    assert late is not None
    climb(control, first, clock)
    clock.now += 30
    best = outcome(late.policy, RUNGS[0]) | {"loss": 0.0}
    assert not control.result(late.number, best)
    assert late.ended == "deadline"
    control.close()
    record.append({"kind": "search", "time": clock.now})
    assert controller(record, seconds=20.0, clock=clock).propose() is None
    again = controller(record, seconds=200.0, clock=clock).propose()
    assert again is not None
    assert (again.number, again.next_rung) == (late.number, RUNGS[1])


def test_what_a_changed_target_cannot_run_is_left_out() -> None:
    record = MemoryRecord()
    run(controller(record))
    known = [Policy.from_dict(e["policy"]) for e in kinds(record, "begin")]

    def deadly(policy: Policy) -> Price:
        if policy == known[0]:
            raise Impossible("the runtime dies of it")
        return price(policy)

    after = Controller(
        Proposals(space()), deadly, NONE, record, Budget(12), clock=Clock(), reprice=True
    )
    assert after.trials[0].ended == "failed"
    assert known[0].digest not in {e["digest"] for e in after.results("full")}
    assert known[0].digest not in {e["digest"] for e in at_full(record.entries())}
    assert not after.proposals.claim(known[0])
