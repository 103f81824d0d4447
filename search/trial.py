"""One policy climbing the rungs, and what is read off its results."""

import math
from dataclasses import dataclass, field

from ..compressors import RUNGS
from ..spaces import Policy
from .finder import Price
from .pareto import Point
from .record import Entry

# How much of a death it is, by what was lost. That a node goes says little of the policy, but one
# that takes eight along is not tried for ever. That a node was taken away, or that there was no
# place to store a result, says nothing. A worker that died while it was idle says nothing either,
# but a trial must not be begun for ever.
LOSSES = {"worker": 1.0, "node": 0.25, "idle": 0.05, "preempted": 0.0, "unstored": 0.0}


@dataclass(eq=False)
class Trial:
    """One policy climbing the rungs. deaths: of workers it ran on, weighed by what was lost."""

    number: int
    policy: Policy
    price: Price
    results: dict[str, Entry] = field(default_factory=dict)
    ended: str | None = None
    deaths: float = 0.0

    @property
    def next_rung(self) -> str:
        """The rung it climbs to, as long as it has not ended."""
        return RUNGS[len(self.results)]

    @property
    def last_rung(self) -> str:
        """The rung of its newest result, of which it has one."""
        return RUNGS[len(self.results) - 1]

    def stopped_at(self, rung: str) -> bool:
        """Whether it stopped behind ``rung``, from where it may go on."""
        return self.ended == "stopped" and self.last_rung == rung


def price_of(entry: Entry) -> Price:
    return Price(tuple(entry["latency_ms"]), entry["size_bytes"], entry["compressed_bytes"])


def not_a_number(outcome: Entry) -> str | None:
    """What is wrong with figures that can neither be compared nor written as JSON."""
    for name in ("loss", "metric"):
        if not math.isfinite(outcome[name]):
            return f"{outcome['rung']}: the {name} is {outcome[name]}"
    return None


def costs(entry: Entry) -> tuple[float, int, int]:
    return entry["latency_ms"][1], entry["size_bytes"], entry["compressed_bytes"]


def point(entry: Entry) -> Point:
    return entry["loss"], entry["latency_ms"][1]


def competes(trial: Trial, rung: str) -> bool:
    """Whether a result counts among those of ``rung`` that others are compared with: it is within
    the limits, and there by its rank. Those by chance are bad, and would lower the bar."""
    below = (trial.results.get(r, {}) for r in RUNGS[: RUNGS.index(rung)])
    known = trial.results.get(rung)
    return bool(
        known and known["constraint"] <= 0 and all(e.get("through") != "chance" for e in below)
    )
