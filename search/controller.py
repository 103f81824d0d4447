"""The search itself, without Ray: what to try next, who climbs, when it ends.

Everything it knows it has from the record; every result goes there first. Whoever runs trials
(Ray Tune in ``tuning``, a loop in a test) calls ``propose``, ``result``, ``died`` and ``failed``.
Limits are enforced before the cost: a policy is priced first, and one that is over a limit is made
smaller or rejected; it never becomes a trial.
"""

import contextlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from ..compressors import RUNGS
from ..spaces import BadInput, FlyweightError, Policy
from .deadline import Results, seconds_left
from .earlier import Earlier
from .finder import Finder, Price
from .limits import Limits
from .pareto import by_chance
from .places import Places
from .record import Entry, Record
from .results import FINALISTS
from .strategies import Source
from .trial import LOSSES, Trial, competes, costs, not_a_number, point

# One in so many climbs on from a rung: to build costs a second, to train whole many times what the
# short rung does.
REDUCTION = {"recalibrate": 2.0, "short": 4.0}
HOPELESS = 8  # trials that failed at a rung that none has a result of: the search ends
DEATHS = 2  # of its worker, and a policy is not tried again: it may be what kills them
GONE = "its policy cannot be built for this target"  # which another session had
UNSTORED = 8  # results, one after another, that workers could not store: the search ends
REFUSALS = 8  # of workers, one after another, to make the task: the search ends
RECENT = 100  # newest results of a rung that say how long it takes
UNUSED = 0.25  # share of the time budget that is worth a word where trials ran out before it
SLACK = 0.05  # share of the time budget by which a rung in progress may overrun it


@dataclass(frozen=True)
class Budget:
    """trials: how many policies are tried. seconds: of search, None for no limit. longer: what the
    full rung trains, in times of the short one; None if that is not known."""

    trials: int
    seconds: float | None = None
    longer: float | None = None


class Controller:
    """Proposes policies, takes results, decides. Never raises into its caller: a record that
    cannot be written, a meter that is gone, or a task that no worker can make, ends the search with
    ``fatal`` set, and so does what nobody foresaw of the proposals.

    look_ahead: see ``Finder``. reprice: what the record knows is priced anew, for a target or a
    profile that has changed. front_alone: what stopped stays so.
    """

    def __init__(
        self,
        proposals: Source,
        price: Callable[[Policy], Price],
        limits: Limits,
        record: Record,
        budget: Budget,
        *,
        clock: Callable[[], float] = time.time,
        listen: Sequence[Callable[[Entry], None]] = (),
        look_ahead: bool = False,
        reprice: bool = False,
        front_alone: bool = False,
    ) -> None:
        self.proposals, self.limits, self.record, self.budget = proposals, limits, record, budget
        self.trials: dict[int, Trial] = {}
        self._reached: dict[str, dict[int, Trial]] = {rung: {} for rung in RUNGS}  # as they came
        self._newest: dict[str, deque[Results]] = {rung: deque(maxlen=RECENT) for rung in RUNGS}
        self.fatal: OSError | FlyweightError | None = None
        self.exhausted = False
        self.interrupted = False
        self._clock, self._listen = clock, listen
        self._front_alone = front_alone
        self._lock = threading.RLock()  # guards everything but prices and proposals
        self._finder = Finder(
            proposals, price, limits, self._reject, self.late_to_look, look_ahead=look_ahead
        )
        self._places = {rung: Places(reduction) for rung, reduction in REDUCTION.items()}
        self._again: list[Trial] = []  # whose worker died, or that an earlier session left
        self._refusals = 0  # of workers to make the task, since the last result
        self._unstored = 0  # results since the last artifact that was stored
        self._spent = 0.0  # seconds of search before this session
        self._began = clock()
        self._new_takes: float | None = None  # seconds of all rungs, of a trial that begins
        entries = record.entries()
        if entries and entries[-1]["kind"] == "search":  # what came before its trials counts
            self._began = entries[-1]["time"]
        self._take_up(Earlier(entries, limits, self._finder.priced if reprice else None))

    # What to try next.

    def propose(self, wait_s: float | None = None) -> Trial | None:
        """The next trial, at its ``next_rung``, or None when the search has none: for good, once
        nothing is ``running`` and none is ``looking``. wait_s: how long to wait for a policy that
        is looked for; without it as long as it takes, which is long where the target is away."""
        while self._again and not self._stopped():
            trial = self._again.pop(0)
            over = trial.price.cost(self.limits) > 0  # a limit that was changed since
            goes_on = not over and self._in_time(trial)
            with self._lock:
                if goes_on:
                    return trial if self._append({"kind": "again", **self._name(trial)}) else None
                self._end(trial, "over_limit" if over else "deadline")
        with self._lock:
            if other := self._last() or self._climber():
                other.ended = None
                return other if self._append({"kind": "again", **self._name(other)}) else None
        try:
            self._finder.catch_up()
            ahead = None if self.over() else self._finder.find(wait_s)
            if ahead is None:
                return None
            found = ahead.result()
        except Exception as error:  # nothing can be priced any more, or proposed
            odd = FlyweightError(f"{type(error).__name__}: {error}")
            self.fatal = self.fatal or (error if isinstance(error, OSError) else odd)
            return None
        if found is None and self._finder.cut_short:
            return None if self.over() else self.propose(wait_s)  # it was late, and is no more
        if found is None:
            self.exhausted = True
            return self.propose(wait_s)  # of those that stopped one may go on now
        with self._lock:
            trial = Trial(len(self.trials), *found)
            self.trials[trial.number] = trial
            begin = {"kind": "begin", **self._name(trial), "policy": trial.policy.to_dict()}
            if not self._append(begin | asdict(trial.price)):
                return None
        if not self.over():
            self._finder.look_ahead()
        return trial

    def looking(self) -> bool:
        """Whether a policy is looked for that may yet become a trial."""
        return self._finder.looking and not self.over()

    def _reject(self, policy: Policy, reason: str, price: Price | None) -> None:
        entry = {"kind": "rejected", "digest": policy.digest, "reason": reason}
        known = {} if price is None else asdict(price)
        with self._lock:
            self._append({**entry, "policy": policy.to_dict(), **known, "time": self._clock()})

    def over(self) -> bool:
        """Whether no more trials begin."""
        if self._stopped():
            return True
        had = self.exhausted or len(self.trials) >= self.budget.trials
        return not self._again and (had or self.late_to_look())

    def _stopped(self) -> bool:
        """Whether no trial begins, nor goes on that waits."""
        late = self.remaining() <= 0 and (bool(self.trials) or self.late_to_look())
        return bool(self.fatal) or self.interrupted or late or self.hopeless()

    def late_to_look(self) -> bool:
        """Whether there is no time for another policy to climb all rungs. The first is looked for
        in any case, for what was found out beforehand may have taken all of it; but no longer than
        as much again."""
        left = self.remaining()
        if not self.trials:
            return left <= -(self.budget.seconds or 0.0)
        with self._lock:  # the finder's thread asks too
            return left <= 0 or not self._in_time()

    def hopeless(self) -> bool:
        """Whether every trial that came to some rung failed there, and enough did: all there are to
        be, or HOPELESS and no fewer than are running, of whom one bad node that fails at once knows
        nothing."""
        rung = next((r for r in RUNGS if not self._reached[r]), None)
        if rung is None:
            return False
        ends = Counter(t.ended for t in self.trials.values() if t.next_rung == rung)
        no_other = self.exhausted and not ends["stopped"]
        enough = 1 if no_other else min(HOPELESS, self.budget.trials)
        return ends["failed"] >= max(enough, ends[None])

    def late(self) -> float:
        """Seconds by which trials in progress took the search over its time budget; 0 if no more
        than they may. The budget is less than a trial takes, or a rung took unusually long."""
        over = 0.0 if self.budget.seconds is None else -self.remaining()
        return over if over > SLACK * (self.budget.seconds or 0.0) else 0.0

    def unused_s(self) -> float:
        """Seconds of the time budget that are left because all trials were tried, or because none
        could end in them; 0 if few are."""
        ended = len(self.trials) >= self.budget.trials or self.late_to_look()
        left = self.remaining() if ended and not self.interrupted and self.budget.seconds else 0.0
        return left if left > UNUSED * (self.budget.seconds or 0.0) else 0.0

    def spent_s(self) -> float | None:
        """The time budget, if no trial could end in what is left of it, else None."""
        could = self.interrupted or any(t.ended == "interrupted" for t in self.trials.values())
        return None if could or not self.late_to_look() else self.budget.seconds

    def elapsed(self) -> float:
        """Seconds of search so far, those before a resume included."""
        return self._spent + self._clock() - self._began

    def remaining(self) -> float:
        """Seconds until the deadline."""
        return math.inf if self.budget.seconds is None else self.budget.seconds - self.elapsed()

    # What came of it.

    def result(self, number: int, outcome: Entry) -> bool:
        """Takes the outcome of a rung; whether the trial goes on to the next."""
        with self._lock:
            return self._result(number, outcome)

    def _result(self, number: int, outcome: Entry) -> bool:
        trial = self.trials.get(number)
        if trial is None or trial.ended:
            return False  # a result that arrives after the end of its trial changes nothing
        if outcome["rung"] != trial.next_rung:
            return True  # nor does one that comes twice
        if "refused" in outcome:
            return self._refused(trial, outcome["refused"])
        if "unstored" in outcome:
            self._unstored += 1
            if self._unstored >= UNSTORED:
                self.fatal = self.fatal or OSError(outcome["unstored"])
            self.died(number, outcome["unstored"], "unstored")
            return False
        error = outcome.get("error") or not_a_number(outcome)
        if error:
            self._end(trial, "failed", error)
            return False
        entry = self._entry(trial, outcome)
        rung = entry["rung"]
        if not self._append(entry):
            return False
        if entry.get("artifact"):
            self._unstored = 0
        self._refusals = 0
        self._learn(trial, entry)
        self.exhausted = False  # what came may teach the proposals where the limits are kept
        if self.limits.cost(*costs(entry)) > 0:
            self._end(trial, "over_limit")
        elif rung == RUNGS[-1]:
            self._end(trial, "finished")
        elif entry["through"] is None:
            self._end(trial, "stopped")
        elif self.interrupted or self.fatal:
            self._end(trial, "interrupted")
        elif not self._in_time(trial):
            self._end(trial, "deadline")
        return trial.ended is None

    def _refused(self, trial: Trial, error: str) -> bool:
        """The worker cannot make the task; what was tried may be tried again. Where none has made
        it, or none any more, none will: the search ends."""
        self._refusals += 1
        if self._refusals >= REFUSALS or not any(self._reached.values()):
            self.fatal = self.fatal or BadInput(error)
        self._end(trial, "interrupted", error)
        return False

    def failed(self, number: int, error: str) -> None:
        """The trial's worker raised."""
        with self._lock:
            trial = self.trials.get(number)
            if trial and not trial.ended:
                self._end(trial, "interrupted" if self.interrupted else "failed", error)

    def died(self, number: int, error: str, lost: str = "worker") -> None:
        """The trial's worker died: the trial goes on from its last rung on another, but a policy
        on which workers die again and again is poisonous. lost: one of ``LOSSES``."""
        with self._lock:
            trial = self.trials.get(number)
            if not trial or trial.ended or trial in self._again:
                return
            trial.deaths += LOSSES[lost]
            if self.interrupted:
                self._end(trial, "interrupted", error)
            elif trial.deaths >= DEATHS:
                self._end(trial, "failed", f"poisonous: {DEATHS} workers died on it: {error}")
            elif self._append({"kind": "died", **self._name(trial), "error": error, "lost": lost}):
                self._again.append(trial)

    def running(self) -> list[Trial]:
        """The trials that somebody runs."""
        return [t for t in self.trials.values() if not t.ended and t not in self._again]

    def waiting(self) -> set[int]:
        """The trials that stopped and may yet go on: those on the front behind those who may have a
        place too, for as more results come there are more places."""
        with self._lock:
            return {
                number
                for rung, places in self._places.items()
                for number in places.ahead(1)
                if self.trials[number].stopped_at(rung)
            }

    def cut_off(self) -> bool:
        """Whether a trial that ran has not ended, though nothing was wrong with the record."""
        return not self.fatal and (bool(self.running()) or not self.over())

    def close(self) -> None:
        """Ends every trial that still runs, so that nothing stays open."""
        self._finder.close()
        with self._lock:
            for trial in self.trials.values():
                if not trial.ended:
                    self._end(trial, "interrupted")
        with contextlib.suppress(Exception):  # nobody asks the proposals any more
            self._finder.catch_up()

    # What is known.

    def results(self, rung: str) -> list[Entry]:
        """The results of ``rung``, oldest first."""
        return [t.results[rung] for t in self._reached[rung].values() if rung in t.results]

    def _entry(self, trial: Trial, outcome: Entry) -> Entry:
        entry = {
            "kind": "result",
            **self._name(trial),
            "policy": trial.policy.to_dict(),
            **outcome,
            "latency_ms": list(trial.price.latency_ms),
        }
        excess = self._excess(entry)
        over = self.limits.cost(*costs(entry)) > 0
        through = None if over or entry["rung"] == RUNGS[-1] else self._through(entry)
        return {**entry, "constraint": excess, "through": through}

    def _excess(self, entry: Entry) -> float:
        """How far a result is over the limits; the metric counts where training has ended."""
        if entry["rung"] == RUNGS[-1]:
            return self.limits.excess(entry["metric"], *costs(entry))
        return self.limits.cost(*costs(entry))

    def _through(self, entry: Entry) -> str | None:
        """What lets a trial within the limits on to the next rung, if time allows: its ``rank``
        among the results so far, or ``chance``; None if nothing does. What its results say of the
        limits in the end is a guess that chance must be able to contradict; what it costs is not.
        """
        rung, trial = entry["rung"], self.trials[entry["trial"]]
        places, number = self._places[rung], trial.number
        places.add(number, point(entry))
        if entry.get("settled"):  # it is built and judged in seconds
            goes = number in places.ahead()
        elif rung == RUNGS[-2]:  # what comes next takes minutes: there others may come first
            goes = places.free() > 0 and self._next(rung, trial) is trial
        else:
            goes = number in places.best()
        if any(below.get("through") == "chance" for below in trial.results.values()):
            places.drop(number)  # it does not compete
        if goes and not self._doomed(entry):
            return "rank"
        return "chance" if by_chance(self.proposals.seed, number, entry["digest"], rung) else None

    def _climber(self) -> Trial | None:
        """One that stopped and goes on: there is a place for it by now, as more are known, or what
        is left of the search has no better use and fewer went on than a front shows. The highest
        rung first."""
        if self._stopped() or self._front_alone:
            return None
        last = self.exhausted or len(self.trials) >= self.budget.trials or self.late_to_look()
        for rung in reversed(REDUCTION):
            places = self._places[rung]
            most = FINALISTS - places.taken if last else 0
            if max(most, places.free()) > 0 and (trial := self._next(rung)):
                self._goes(trial, rung)
                return trial
        return None

    def _next(self, rung: str, newest: Trial | None = None) -> Trial | None:
        """Of those that are ahead at ``rung`` and stopped there, or are the ``newest``: the one
        that adds most to those that went on."""
        places = self._places[rung]

        def waits(trial: Trial) -> bool:
            return trial is newest or trial.stopped_at(rung)

        for number in places.by_gain(n for n in places.ahead() if waits(self.trials[n])):
            trial = self.trials[number]
            if trial is newest:
                return trial
            over = trial.price.cost(self.limits) > 0 or self._doomed(trial.results[rung])
            if not over and self._in_time(trial):
                return trial
        return None

    def _goes(self, trial: Trial, rung: str) -> None:
        """``trial`` goes on from ``rung``. What is trained no further takes nobody's place."""
        if competes(trial, rung):
            self._places[rung].goes(trial.number, not trial.results[rung].get("settled"))

    def _name(self, trial: Trial) -> Entry:
        return {"trial": trial.number, "digest": trial.policy.digest, "time": self._clock()}

    def _learn(self, trial: Trial, entry: Entry) -> None:
        trial.results[entry["rung"]] = entry
        self._reached[entry["rung"]][trial.number] = trial
        self._newest[entry["rung"]].appendleft(trial.results)
        if entry.get("through") == "rank":
            self._goes(trial, entry["rung"])
        if self.budget.seconds is not None:
            self._new_takes = self._takes({})
        figures = entry["loss"], entry["latency_ms"][1], entry["constraint"]
        self._finder.tell(partial(self.proposals.tell, trial.policy, entry["rung"], *figures))

    def _end(self, trial: Trial, reason: str, error: str | None = None) -> None:
        trial.ended = reason
        if reason == "failed":
            for places in self._places.values():
                places.drop(trial.number)
        self._finder.tell(partial(self.proposals.fail, trial.policy))
        entry = {"kind": "end", **self._name(trial), "reason": reason, "error": error}
        if reason == "stopped" and trial.number in self.waiting():
            entry["ahead"] = True  # it may yet go on
        self._append(entry)

    def _append(self, entry: Entry) -> bool:
        try:
            self.record.append(entry)
        except OSError as error:
            self.fatal = self.fatal or error
            return False
        for listener in self._listen:
            listener(entry)
        return True

    def _doomed(self, entry: Entry) -> bool:
        """Whether finished trials say that this one will lose too much: two that were no worse at
        its rung ended over ``max_drop``, and none that was no better there kept it."""
        if self.limits.max_drop is None:
            return False
        over = 0
        for trial in self._reached[RUNGS[-1]].values():
            full, then = trial.results.get(RUNGS[-1]), trial.results.get(entry["rung"])
            if full is None or then is None:
                continue
            kept = self.limits.drop(full["metric"]) <= self.limits.max_drop
            if kept and then["loss"] >= entry["loss"]:
                return False
            over += not kept and then["loss"] <= entry["loss"]
        return over >= 2

    def _in_time(self, trial: Trial | None = None) -> bool:
        """Whether ``trial``, or a new one, will end near the deadline if it climbs on now.

        A search ends with something to show: while nothing has finished one trial, alone, climbs on
        past the deadline.
        """
        if self.budget.seconds is None:
            return True
        takes = self._takes(trial.results) if trial and trial.results else self._new_takes
        left = self.remaining()
        fits = left > 0 if takes is None else takes <= left + SLACK * self.budget.seconds
        if fits:
            return True
        had = len(trial.results) if trial else 0
        as_far = (t for t in self.running() if t is not trial and len(t.results) >= had)
        return not self._reached[RUNGS[-1]] and not any(as_far)

    def _takes(self, own: Results) -> float | None:
        """Seconds that a trial with the results ``own`` still takes, if that is known."""
        return seconds_left(own, self._newest, self.budget.longer)

    def _last(self) -> Trial | None:
        """Where nothing has finished and no trial runs any more: of those that the deadline or
        others stopped, or that wait, the one nearest to the end. It goes on past the deadline, but
        is not begun later than as much again: each that did so before has failed."""
        if self.fatal or self.interrupted or self.budget.seconds is None:
            return None
        if self._reached[RUNGS[-1]] or self.running() or self.hopeless():
            return None
        spent = self._spent >= self.budget.seconds  # before this session, which only reports then
        if spent or self.remaining() <= -self.budget.seconds:
            return None
        waiting = [
            t for t in self.trials.values()
            if (t.ended in ("deadline", "stopped") or t in self._again)
            and t.price.cost(self.limits) <= 0
        ]  # fmt: skip
        if not waiting:
            return None
        last = max(waiting, key=lambda t: (len(t.results), -_loss(t)))
        self._again = [t for t in self._again if t is not last]
        return last

    def _take_up(self, earlier: Earlier) -> None:
        """Goes on where the sessions before ended."""
        self.trials, self._spent = earlier.trials, earlier.spent_s
        for policy in earlier.proposed:
            self.proposals.claim(policy)
        for trial, entry in earlier.results:
            self._learn(trial, {**entry, "constraint": self._excess(entry)})
        for trial, rung in earlier.went:
            self._goes(trial, rung)
        for rung, places in self._places.items():
            for number, trial in self._reached[rung].items():
                if trial.ended == "failed":
                    places.drop(number)
                elif competes(trial, rung):
                    places.add(number, point(trial.results[rung]))
        for trial in self.trials.values():
            # It was killed in between, or cannot be built for the target any more.
            if trial.ended and trial.number not in earlier.ends:
                self._end(trial, trial.ended, GONE if trial.ended == "failed" else None)
            # There was no time for it, and now there may be.
            if trial.ended == "deadline" and self.remaining() > 0 and self._in_time(trial):
                trial.ended = None
        self._again = [t for t in self.trials.values() if not t.ended]
        for number, told in earlier.told.items():  # who reads the record compares like with like
            trial = self.trials[number]
            now = list(trial.price.latency_ms) if RUNGS[-1] in trial.results else None
            if now != told:
                self._append({"kind": "priced", **self._name(trial), "latency_ms": now})


def _loss(trial: Trial) -> float:
    """That of its last result, 0 without one."""
    return float(next(reversed(trial.results.values()))["loss"]) if trial.results else 0.0


def failures(entries: Sequence[Entry], most: int = 3) -> list[tuple[str, int]]:
    """The commonest reasons of failure with how often each came."""
    counts: dict[str, int] = {}
    for entry in entries:
        if entry["kind"] == "end" and entry["reason"] == "failed":
            reason = str(entry["error"]).splitlines()[0]
            counts[reason] = counts.get(reason, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])[:most]
