"""What earlier sessions of a search left, read from its record."""

from collections.abc import Callable, Sequence

from ..compressors import RUNGS
from ..spaces import Impossible, Policy
from .finder import Price
from .limits import Limits
from .record import Entry, at_work, ends
from .trial import LOSSES, Trial, costs, price_of


class Earlier:
    """price: today's; without it that in the record holds.

    trials: by number, as they ended; ``ended`` is None where one goes on. results: as they came, at
    the price that holds. went: who went on from which rung after it had stopped there. proposed:
    policies that are not for another proposal. ends: by trial, those that the record has. told: by
    trial, what it says that artifacts are predicted to take, in ms. spent_s: of search.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        limits: Limits,
        price: Callable[[Policy], Price] | None = None,
    ) -> None:
        self.trials: dict[int, Trial] = {}
        self.proposed: list[Policy] = []
        self.results: list[tuple[Trial, Entry]] = []
        self.went: list[tuple[Trial, str]] = []
        self.ends = ends(entries)
        self.told = {e["trial"]: e["latency_ms"] for e in entries if _prices(e)}
        self.spent_s = next(reversed(at_work(entries)), 0.0)
        self._limits, self._today = limits, price
        read = {
            "begin": self._begin, "rejected": self._rejected, "result": self._result,
            "died": self._died, "again": self._end, "end": self._end,
        }  # fmt: skip
        for entry in entries:
            if entry["kind"] in read:
                read[entry["kind"]](entry)

    def _price(self, policy: Policy, entry: Entry) -> Price | None:
        """The price in ``entry``, or today's; None if it is impossible today."""
        if self._today is None:
            return None if entry["latency_ms"] is None else price_of(entry)
        try:
            return self._today(policy)
        except Impossible:
            return None

    def _begin(self, entry: Entry) -> None:
        number, policy = entry["trial"], Policy.from_dict(entry["policy"])
        newest = {"latency_ms": self.told[number]} if number in self.told else {}
        price = self._price(policy, entry | newest)
        self.trials[number] = Trial(number, policy, price or price_of(entry))
        self.trials[number].ended = None if price else "failed"
        self.proposed.append(policy)

    def _rejected(self, entry: Entry) -> None:
        policy = Policy.from_dict(entry["policy"])
        price: Price | None = None
        if "latency_ms" in entry:  # over a limit that may have been changed since
            then = price_of(entry)
            large = self._limits.cost(0.0, then.size_bytes, then.compressed_bytes) > 0
            price = then if large else self._price(policy, entry)
        if price is None or price.cost(self._limits) > 0:
            self.proposed.append(policy)

    def _result(self, entry: Entry) -> None:
        trial = self.trials[entry["trial"]]
        if trial.ended == "failed":
            return  # what it is priced at now is impossible
        entry = {**entry, "latency_ms": list(trial.price.latency_ms)}
        trial.results[entry["rung"]] = entry
        self.results.append((trial, entry))
        if entry["rung"] == RUNGS[-1]:
            over = self._limits.cost(*costs(entry)) > 0
            trial.ended = "over_limit" if over else "finished"

    def _died(self, entry: Entry) -> None:
        self.trials[entry["trial"]].deaths += LOSSES[entry.get("lost", "worker")]

    def _end(self, entry: Entry) -> None:
        """Or that it goes on, which has no reason."""
        trial, reason = self.trials[entry["trial"]], entry.get("reason")
        if reason == "interrupted":
            return
        if trial.ended == "stopped":
            self.went.append((trial, trial.last_rung))
        if trial.ended != "failed":
            trial.ended = reason


def _prices(entry: Entry) -> bool:
    """Whether it says what an artifact is predicted to take."""
    return entry["kind"] == "priced" or (entry["kind"], entry.get("rung")) == ("result", RUNGS[-1])
