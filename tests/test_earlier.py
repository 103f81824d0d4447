"""What earlier sessions left, read from a record written by hand."""

from typing import Any

import pytest

from flyweight.search.earlier import Earlier
from flyweight.search.finder import Price
from flyweight.search.limits import Limits
from flyweight.spaces import Impossible, Policy, Prune

LIMITS = Limits(90.0, latency_ms=1.0, size_bytes=15)
POLICY = Policy(Prune({"a": 8}))
PRICE = {"latency_ms": [0.4, 0.5, 0.6], "size_bytes": 10, "compressed_bytes": 5}
BEGIN = {"kind": "begin", "trial": 0, "policy": POLICY.to_dict(), "time": 1.0, **PRICE}


def result(rung: str, **more: Any) -> dict[str, Any]:
    return {"kind": "result", "trial": 0, "rung": rung, "time": 2.0, **PRICE, **more}


def end(reason: str) -> dict[str, Any]:
    return {"kind": "end", "trial": 0, "reason": reason, "time": 3.0}


AGAIN = {"kind": "again", "trial": 0, "time": 4.0}


@pytest.mark.parametrize(
    ("entries", "ended"),
    [
        ([], None),
        ([result("recalibrate"), end("stopped")], "stopped"),
        ([result("recalibrate"), end("stopped"), AGAIN], None),
        ([end("interrupted")], None),
        ([end("deadline")], "deadline"),
        ([end("failed"), AGAIN], "failed"),
        ([result("recalibrate"), result("short"), result("full")], "finished"),
        ([result("full"), end("finished")], "finished"),
        ([result("full", size_bytes=20)], "over_limit"),
    ],
)
def test_trials_are_as_they_ended(entries: list[dict[str, Any]], ended: str | None) -> None:
    found = Earlier([BEGIN, *entries], LIMITS)
    trial = found.trials[0]
    assert (trial.policy, trial.ended) == (POLICY, ended)
    assert found.proposed == [POLICY]
    assert [e["rung"] for _, e in found.results] == list(trial.results)
    assert found.went == ([(trial, "recalibrate")] if end("stopped") in entries[:-1] else [])


def test_deaths_weigh_by_what_was_lost() -> None:
    died = [{"kind": "died", "trial": 0, "lost": lost, "time": 2.0} for lost in ("worker", "node")]
    assert Earlier([BEGIN, *died], LIMITS).trials[0].deaths == 1.25


def test_a_price_of_today_holds_and_may_be_none() -> None:
    def impossible(_: Policy) -> Price:
        raise Impossible("no such kernel")

    entries = [BEGIN, *map(result, ("recalibrate", "short", "full"))]
    today = Earlier(entries, LIMITS, lambda _: Price((1.0, 2.0, 3.0), 10, 5))
    assert [e["latency_ms"] for _, e in today.results] == [[1.0, 2.0, 3.0]] * 3
    assert today.told == {0: PRICE["latency_ms"]}
    none = Earlier(entries, LIMITS, impossible)
    assert (none.trials[0].ended, none.results) == ("failed", [])


def test_what_was_rejected_may_be_proposed_again_where_the_limit_changed() -> None:
    rejected = {"kind": "rejected", "policy": POLICY.to_dict(), "time": 1.0}
    assert Earlier([rejected], LIMITS).proposed == [POLICY]  # impossible
    slow = {**rejected, **PRICE, "latency_ms": [1.4, 1.5, 1.6]}
    assert Earlier([slow], LIMITS).proposed == [POLICY]
    assert Earlier([slow], Limits(90.0, latency_ms=2.0)).proposed == []
    large = Limits(90.0, size_bytes=9)  # what it takes in bytes hangs on no target
    assert Earlier([{**rejected, **PRICE}], large).proposed == [POLICY]
