"""A search on a simulated clock: the production classes without Ray, threads or real work.

An event queue stands for Ray Tune and its workers. It does what ``tuning`` has Tune do: asks the
controller for a trial whenever a worker is free, brings it each result at its time, goes on or
stops as the controller says. A search of days over hundreds of workers takes seconds.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..compressors import RUNGS
from ..spaces import Policy
from .controller import Controller
from .record import Entry
from .trial import Trial

# What a worker finds for a policy at a rung, and the seconds it takes. The entry holds ``loss``,
# ``metric``, ``size_bytes`` and ``compressed_bytes``, or ``error``; None: the worker died.
Evaluate = Callable[[Policy, str], tuple[Entry | None, float]]


class Clock:
    """Seconds that pass only when told. Call it to read it, as ``time.time``."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass
class Outcome:
    """What a simulated search took. What it found is in its record.

    seconds: until the last worker was free. busy_s: of work, all workers together. waited_s: from
    the end of some work to the beginning of the next on the same worker, all workers together;
    that nothing is left to begin while the last trials run is not counted. controller_s: by trial,
    what the controller took to propose it and to take its results.
    """

    seconds: float = 0.0
    busy_s: float = 0.0
    waited_s: float = 0.0
    controller_s: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def idle(self) -> float:
        """The share of the workers' time that they waited for something to do."""
        return self.waited_s / ((self.busy_s + self.waited_s) or 1.0)


def simulate(
    controller: Controller,
    evaluate: Evaluate,
    workers: int,
    clock: Clock,
    timer: Callable[[], float] = lambda: 0.0,
) -> Outcome:
    """Runs the search of ``controller`` to its end and closes it.

    ``controller`` must have been made with ``clock``. Without a ``timer`` it decides in no time,
    and the same arguments give the same record. With one (``time.perf_counter``) the seconds that
    it really takes pass on the clock: it is one thread, who asks meanwhile must wait. What
    ``evaluate`` raises is raised: a driver that was killed, the record is as it was left.
    """
    out, began, free = Outcome(), clock.now, workers
    events: list[tuple[float, int, Trial, str, Entry | None]] = []  # heap, by time
    order = itertools.count()  # of what happens at the same time, the older first

    def charge(trial: Trial, since: float) -> None:
        """What the controller did since then takes its time on the clock too."""
        took = timer() - since
        clock.now += took
        out.controller_s[trial.number] += took

    def work(trial: Trial, rung: str, waiting: float) -> None:
        """A worker that waits since ``waiting`` begins a rung."""
        entry, seconds = evaluate(trial.policy, rung)
        out.waited_s += clock.now - waiting
        out.busy_s += seconds
        if entry is not None:
            took = {"rung": rung, "seconds": seconds, "rung_seconds": seconds, "artifact": None}
            entry = took | entry
        heapq.heappush(events, (clock.now + seconds, next(order), trial, rung, entry))

    def ask(waiting: float) -> bool:
        """Whether there is a trial for a free worker."""
        since = timer()
        trial = controller.propose()
        if trial is not None:
            charge(trial, since)
            work(trial, trial.next_rung, waiting)
        return trial is not None

    def report(trial: Trial, entry: Entry | None) -> bool:
        """Whether the trial goes on."""
        since, goes_on = timer(), False
        if entry is None:
            controller.died(trial.number, "its worker died")
        else:
            goes_on = controller.result(trial.number, entry)
        charge(trial, since)
        return goes_on

    ended = began
    while True:
        while free and ask(ended):
            free -= 1
        if not events:
            break
        ended, _, trial, rung, entry = heapq.heappop(events)
        clock.now = max(clock.now, ended)  # later where the controller was busy
        if report(trial, entry):
            work(trial, RUNGS[RUNGS.index(rung) + 1], ended)
        else:
            free += 1
    out.seconds = ended - began
    controller.close()
    return out
