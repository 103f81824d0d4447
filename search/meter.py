"""Measures latency: provisional while trials run, and of finalists alone."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels import Runtime, Timing, disturbed, make_runtime, time_sessions

Feed = dict[str, np.ndarray[Any, Any]]
AGAIN = 3  # tries to measure finalists undisturbed


class Meter:
    """Times models beside the teacher, on one target. Knows neither torch nor Ray."""

    def __init__(self, runtime: str, threads: int, teacher: bytes, feed: Feed) -> None:
        self._runtime: Runtime = make_runtime(runtime, threads)
        self._feed = feed
        self._teacher = self._runtime.load(teacher)
        self.teacher_ms = 0.0

    def fingerprint(self) -> str:
        return self._runtime.fingerprint

    def alone(self) -> float:
        """The teacher's latency in ms, measured while nothing else runs; remembered."""
        self.teacher_ms = time_sessions({"teacher": self._teacher}, self._feed)["teacher"].median_ms
        return self.teacher_ms

    def provisional(self, model: bytes) -> tuple[float, float, float]:
        """Minimum, median and maximum latency in ms of ``model``, while other work goes on.

        What it takes beside the teacher in the same rounds, times what the teacher takes alone.
        """
        sessions = {"teacher": self._teacher, "model": self._runtime.load(model)}
        # With one thread the CPU time of that thread is what an undisturbed machine would take.
        single = self._runtime.threads == 1 and "CPU" in str(self._runtime.device).upper()
        clock = time.thread_time_ns if single else time.perf_counter_ns
        timings = time_sessions(sessions, self._feed, rounds=9, clock=clock)
        scale = (self.teacher_ms or timings["teacher"].median_ms) / timings["teacher"].median_ms
        found = timings["model"]
        return found.min_ms * scale, found.median_ms * scale, found.max_ms * scale

    def finalists(self, models: Mapping[str, bytes]) -> dict[str, Timing]:
        """Timings of ``models`` and the teacher, interleaved; again when they were disturbed."""
        sessions = {"teacher": self._teacher}
        sessions |= {name: self._runtime.load(model) for name, model in models.items()}
        for _ in range(AGAIN):
            timings = time_sessions(sessions, self._feed)
            if not disturbed(timings):
                break
        return timings
