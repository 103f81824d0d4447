"""Honest timing: interleaved rounds, the minimum of a round, the median over rounds.

On a machine with other work, the mean and the median of one run move by tens of per cent. The
minimum of a few calls in a row is what the model takes when it is let alone; rounds spread every
model over the same stretch of time, so that whatever slows the machine slows all of them.

No minimum helps when there are more busy processes than cores and a call lasts longer than the
scheduler's slice (3 ms): measured so, a model of 7 ms seemed to take 16, its ratio to one of 2 ms
doubled, and the rounds agreed to 0.2%. Hence ``waiting``, which spread cannot replace.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from .runtime import Inputs, Session

Clock = Callable[[], int]  # nanoseconds

LEAST_CALLS = 3
LEAST_ROUNDS = 5  # of fewer, quartiles say little
TEACHER = "teacher"
# A median of 15 rounds has a standard error of about a quarter of the inter-quartile range, so
# 0.1 means about 2.5% on the teacher, half of what a reported speed-up may be off.
MOST_SPREAD = 0.1
MOST_WAITING = 0.05


@dataclass(frozen=True)
class Timing:
    """The latency of one model.

    rounds_ms: the fastest call of each round, in order.
    waiting: the share of those calls (median) in which the calling thread was kept off the CPU; 0
        on a machine that has a core to spare.
    """

    rounds_ms: tuple[float, ...]
    waiting: float = 0.0

    @property
    def median_ms(self) -> float:
        """The latency: the median over the rounds."""
        return median(self.rounds_ms)

    @property
    def min_ms(self) -> float:
        """The fastest round."""
        return min(self.rounds_ms)

    @property
    def max_ms(self) -> float:
        """The slowest round."""
        return max(self.rounds_ms)

    @property
    def spread(self) -> float:
        """The inter-quartile range of the rounds over their median; 0 for a single round.

        Robust: nearly a quarter of the rounds may be disturbed at will and it hardly moves.
        """
        if len(self.rounds_ms) < 2:
            return 0.0
        low, _, high = quantiles(self.rounds_ms, n=4, method="inclusive")
        return (high - low) / self.median_ms if high > low else 0.0


def visiting_order(sessions: int, round_: int) -> list[int]:
    """The order in which a round visits the sessions: a row of a Williams design (1949).

    Over as many rounds as sessions (twice as many if their number is odd) every session has been
    at every place, and has followed every other, equally often: nobody profits from a neighbour
    that leaves the caches warm.
    """
    zigzag = [(i + 1) // 2 if i % 2 else sessions - i // 2 for i in range(sessions)]
    order = [(place + round_) % sessions for place in zigzag]
    return order[::-1] if sessions % 2 and (round_ // sessions) % 2 else order


def calls_within(visit_ms: float, call_ms: float, repeats: int) -> int:
    """Calls of ``call_ms`` that fit into a visit: at most ``repeats``, at least 3 of them."""
    fit = repeats if call_ms * repeats <= visit_ms else int(visit_ms / call_ms)
    return min(repeats, max(LEAST_CALLS, fit))


def rounds_within(most_ms: float, round_ms: float, rounds: int) -> int:
    """Rounds of ``round_ms`` that fit into ``most_ms``: at most ``rounds``, at least 5 of them."""
    fit = rounds if round_ms * rounds <= most_ms else int(most_ms / round_ms)
    return min(rounds, max(LEAST_ROUNDS, fit))


def time_sessions(
    sessions: Mapping[str, Session],
    inputs: Inputs,
    rounds: int = 15,
    repeats: int = 20,
    warmup: int = 1,
    visit_ms: float = 50.0,
    most_ms: float = math.inf,
    clock: Clock = time.perf_counter_ns,
    cpu_clock: Clock | None = None,
) -> dict[str, Timing]:
    """The latency of each session on the same ``inputs``, measured side by side.

    A round visits every session once: ``warmup`` calls, then ``repeats`` calls, of which the
    fastest counts. A slow model gets fewer calls, so that they last about ``visit_ms``, but never
    fewer than 3. most_ms: where all rounds would take longer, there are fewer, but never fewer than
    5. cpu_clock: the time that the calling thread was on the CPU, for ``waiting``; the thread's
    own, or ``clock`` where that is not the real one.
    Raises ValueError for counts below 1 (``warmup``: 0).
    """
    if rounds < 1 or repeats < 1 or warmup < 0:
        rule = "rounds >= 1, repeats >= 1 and warmup >= 0 must hold"
        raise ValueError(f"{rule}, but got {rounds}, {repeats} and {warmup}")
    if cpu_clock is None:
        cpu_clock = time.thread_time_ns if clock is time.perf_counter_ns else clock
    names = list(sessions)
    calls: dict[str, int] = {}
    round_ms = 0.0
    for name in names:  # the first calls of a session allocate, so they only size its visits
        first = min(LEAST_CALLS, repeats)
        call_ms, _ = _visit(sessions[name], inputs, warmup, first, clock, cpu_clock)
        calls[name] = calls_within(visit_ms, call_ms, repeats)
        round_ms += (warmup + calls[name]) * call_ms
    visits: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for round_ in range(rounds_within(most_ms, round_ms, rounds)):
        for place in visiting_order(len(names), round_):
            name = names[place]
            seen = _visit(sessions[name], inputs, warmup, calls[name], clock, cpu_clock)
            visits[name].append(seen)
    return {
        name: Timing(tuple(ms for ms, _ in seen), median(waiting for _, waiting in seen))
        for name, seen in visits.items()
    }


def _visit(
    session: Session, inputs: Inputs, warmup: int, calls: int, clock: Clock, cpu_clock: Clock
) -> tuple[float, float]:
    """The fastest of ``calls`` calls in ms, and the share of it spent off the CPU."""
    run = session.run
    for _ in range(warmup):
        run(inputs)
    seen = []
    for _ in range(calls):
        cpu_start, start = cpu_clock(), clock()
        run(inputs)
        end, cpu_end = clock(), cpu_clock()
        seen.append((end - start, cpu_end - cpu_start))
    wall, on_cpu = min(seen)
    # a CPU clock too coarse to see the call (Windows: 16 ms) says nothing
    return wall / 1e6, max(0.0, 1 - on_cpu / wall) if wall and on_cpu else 0.0


def disturbed(timings: Mapping[str, Timing], most_waiting: float = MOST_WAITING) -> bool:
    """Whether the machine was too busy to trust ``timings``.

    Either the rounds of the sentinel spread widely (the teacher: every measurement has it; without
    one, any model speaks), or some model had to wait for the CPU. ``waiting`` means nothing where
    the calling thread waits for a GPU: pass ``most_waiting=1`` there.
    """
    watched = [timings[TEACHER]] if TEACHER in timings else list(timings.values())
    waited = any(timing.waiting > most_waiting for timing in timings.values())
    return waited or any(timing.spread > MOST_SPREAD for timing in watched)
