"""Measures latency: provisional while trials run, and of finalists alone."""

import contextlib
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..kernels import (
    MeasuringProcess,
    Runtime,
    Session,
    Timing,
    disturbed,
    make_runtime,
    time_sessions,
)
from ..kernels.timing import MOST_WAITING
from ..spaces import Impossible
from .cache import key_of

Feed = dict[str, np.ndarray[Any, Any]]
AGAIN = 8  # tries to measure undisturbed, with half a minute between them in all
MOST_S = 60.0  # for one measurement, and after which no further try to measure finalists begins
ALONE_S = 10.0  # the same for the teacher, before anything else
PRICE_S = 10.0  # for one policy, while trials wait for others
QUIET = 1.05  # share of its latency alone within which the teacher says that nothing else runs


@dataclass(frozen=True)
class Device:
    """What is measured on. facts, fingerprint: as the runtime tells them. capabilities: a digest of
    what its kernels can do. weight_bits: of an int8 weight. node: of a cluster, where it is one."""

    facts: Mapping[str, str]
    fingerprint: str
    capabilities: str
    weight_bits: int
    node: str | None = None

    @classmethod
    def of(cls, runtime: Runtime, node: str | None = None) -> Self:
        """This machine, as ``runtime`` uses it."""
        capabilities = key_of(repr(runtime.capabilities))
        bits = runtime.capabilities.weight_bits
        return cls(runtime.device, runtime.fingerprint, capabilities, bits, node)

    @property
    def int8(self) -> str:
        """How its kernels do int8, in words."""
        return f"weights of {self.weight_bits} bits (kernels {self.capabilities[:8]})"

    @classmethod
    def of_this(cls, runtime: str, threads: int, node: str | None = None) -> Self:
        """The same, by the name of the runtime."""
        return cls.of(make_runtime(runtime, threads), node)


def on_cpu(facts: Mapping[str, str]) -> bool:
    """Whether the device of ``facts`` runs models on its CPU, which every device has."""
    return "gpu" not in facts


def noisy(timings: Mapping[str, Timing], facts: Mapping[str, str]) -> bool:
    """Whether the device of ``facts`` was too busy to trust ``timings``. For a GPU the calling
    thread waits in any case: that says nothing there."""
    return disturbed(timings, most_waiting=MOST_WAITING if on_cpu(facts) else 1.0)


def noise(timings: Mapping[str, Timing], facts: Mapping[str, str], run_dir: Path) -> str | None:
    """What is to be known of the finalists of ``run_dir`` where their timings are ``noisy``."""
    if not noisy(timings, facts):
        return None
    return (
        f"Something else ran on this device while the finalists were timed: {_told(timings)}. When "
        f"it is quiet, `flyweight measure {run_dir}` times them again"
    )


def _told(timings: Mapping[str, Timing]) -> str:
    waited = max(timing.waiting for timing in timings.values())
    return (
        f"the rounds of the teacher spread by {timings['teacher'].spread:.0%}, calls waited for a "
        f"core for up to {waited:.0%} of their time"
    )


class ThisMachine:
    """What is needed to measure on this machine, and the process that times networks here. start:
    the arguments of a ``Meter`` or a ``MeasuringProcess``."""

    def __init__(self, runtime: str, threads: int, teacher: bytes, feed: Feed) -> None:
        self.start = runtime, threads, teacher, feed
        self.device = Device.of_this(runtime, threads)

    def process(self) -> AbstractContextManager[Any]:
        return MeasuringProcess(*self.start)


class Meter:
    """Times models beside the teacher, on one target. Knows neither torch nor Ray. teacher_ms: what
    the teacher takes alone, 0 where that is not known yet. disturbed: what showed that it was not
    alone, "" if nothing did."""

    def __init__(
        self, runtime: str, threads: int, teacher: bytes, feed: Feed, teacher_ms: float = 0.0
    ) -> None:
        self._runtime: Runtime = make_runtime(runtime, threads)
        self._feed = feed
        self._teacher = self._runtime.load(teacher)
        self.teacher_ms = teacher_ms
        self.disturbed = ""

    def alone(self) -> float:
        """The teacher's latency in ms, measured while nothing else runs; remembered. Where
        something does (the processes of Ray that just begin), it is measured again for a while."""
        found = self._quietest({"teacher": self._teacher}, math.inf, ALONE_S)
        self.teacher_ms = found["teacher"].median_ms
        self.disturbed = _told(found) if noisy(found, self._runtime.device) else ""
        return self.teacher_ms

    def provisional(self, model: bytes) -> tuple[float, float, float]:
        """Minimum, median and maximum latency in ms of ``model``, while other work goes on.

        What it takes beside the teacher in the same rounds, times what the teacher takes alone.
        """
        sessions = {"teacher": self._teacher, "model": self._runtime.load(model)}
        # With one thread the CPU time of that thread is what an undisturbed machine would take.
        single = self._runtime.threads == 1 and on_cpu(self._runtime.device)
        clock = time.thread_time_ns if single else time.perf_counter_ns
        how: dict[str, Any] = {"rounds": 9, "most_ms": 1e3 * PRICE_S}
        timings = time_sessions(sessions, self._feed, clock=clock, **how)
        if not all(timing.min_ms for timing in timings.values()):
            # A clock of CPU time may be too coarse to see a call: Windows', some virtual machines'.
            timings = time_sessions(sessions, self._feed, **how)
        scale = (self.teacher_ms or timings["teacher"].median_ms) / timings["teacher"].median_ms
        found = timings["model"]
        return found.min_ms * scale, found.median_ms * scale, found.max_ms * scale

    def finalists(self, models: Mapping[str, bytes], alone_ms: float) -> dict[str, Timing]:
        """Timings of ``models`` and the teacher, interleaved, as the machine is when it is quiet.

        The teacher is the sentinel: while it takes longer than ``alone_ms``, what it took alone
        before the search, something else runs here, and a sibling thread of the core slows int8
        and float differently. Then it is measured again, a little later, for about a minute; the
        quietest counts.

        A model that the runtime refuses is left out.
        """
        sessions = {"teacher": self._teacher}
        for name, model in models.items():
            with contextlib.suppress(Impossible):
                session = self._runtime.load(model)
                session.run(self._feed)
                sessions[name] = session
        return self._quietest(sessions, QUIET * alone_ms, MOST_S)

    def _quietest(
        self, sessions: Mapping[str, Session], teacher_ms: float, seconds: float
    ) -> dict[str, Timing]:
        """Timings from when the machine is quiet and the teacher takes no more than ``teacher_ms``;
        where it is not so within about ``seconds``, the quietest."""
        began, tries = time.monotonic(), []
        for attempt in range(AGAIN):
            time.sleep(attempt)
            tries.append(time_sessions(sessions, self._feed, most_ms=1e3 * MOST_S))
            slow = tries[-1]["teacher"].median_ms > teacher_ms
            if not slow and not noisy(tries[-1], self._runtime.device):
                return tries[-1]
            if time.monotonic() - began > seconds:
                break
        return min(tries, key=lambda timings: timings["teacher"].median_ms)
