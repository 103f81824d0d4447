"""How long a trial still takes."""

from typing import Any

import pytest

from flyweight.compressors import RUNGS
from flyweight.search.deadline import NEAR, Results, seconds_left


def had(*seconds: float, macs: int | None = None, settled: bool = False) -> dict[str, Any]:
    """The results of a trial whose rungs took ``seconds``."""
    return {
        rung: {"rung_seconds": s, "macs": macs, "settled": settled and rung != RUNGS[0]}
        for rung, s in zip(RUNGS, seconds, strict=False)
    }


def among(*trials: dict[str, Any]) -> dict[str, list[Results]]:
    return {rung: [t for t in trials if rung in t] for rung in RUNGS}


def test_one_that_begins_may_be_as_quick_as_the_quickest_that_was_trained() -> None:
    others = among(had(1, 2, 10), had(1, 4, 30), had(3, 4), had(1, 1, 1, settled=True))
    assert seconds_left({}, others) == 1 + 2 + 10
    assert seconds_left({}, among(had(1, 1, 3, settled=True), had(2, 4))) == 1 + 4 + 3


def test_before_anybody_has_had_a_rung_nobody_knows() -> None:
    assert seconds_left({}, among()) is None
    assert seconds_left(had(1), among(had(1))) is None
    assert seconds_left(had(1, 2), among(had(1, 2))) is None


def test_a_first_full_rung_is_judged_by_the_short_one() -> None:
    assert seconds_left(had(1, 5), among(had(1, 5)), longer=9.0) == 45
    assert seconds_left(had(1), among(had(1, 2)), longer=9.0) == 2 + 18
    # What is trained no more is only built.
    assert seconds_left(had(1, 5, settled=True), among(had(1, 5, 40)), longer=9.0) == 1


def test_who_is_slow_at_the_short_rung_is_slow_at_the_full_one() -> None:
    others = among(had(1, 2, 10), had(1, 4, 20), had(1, 2, 12))
    assert seconds_left(had(1, 10), others) == 50


def test_who_is_near_untrained_is_built_once_more() -> None:
    near = {RUNGS[0]: {"rung_seconds": 3, "macs": None, "settled": True}}
    assert seconds_left(near, among(had(1, 2, 100))) == 3
    assert seconds_left(near, among()) == 3


@pytest.mark.parametrize(("settled", "left"), [(False, 100.0), (True, 2.0)])
def test_who_is_trained_no_more_is_no_measure_of_who_is(settled: bool, left: float) -> None:
    others = among(*[had(1, 1, 2, settled=True)] * 3, had(1, 1, 100))
    assert seconds_left(had(1, 1, settled=settled), others) == left
    assert seconds_left(had(1), others) == 1 + 2  # not known yet: most are trained no more


def test_of_few_a_third_is_near_enough() -> None:
    others = among(had(1, 1, 33, macs=55), had(1, 1, 91, macs=215), had(1, 1, 73, macs=143))
    assert seconds_left(had(1, macs=60), others) == 1 + (33 + 73) / 2
    assert seconds_left(had(1, macs=200), others) == 1 + (91 + 73) / 2


def test_networks_of_as_much_work_say_how_long_it_takes() -> None:
    small = [had(1, 1, 10, macs=1000 + i) for i in range(NEAR)]
    large = [had(1, 5, 50, macs=10**6 + i) for i in range(2 * NEAR)]
    others = among(*small, *large)
    assert seconds_left(had(1, macs=900), others) == 1 + 10
    assert seconds_left(had(1, macs=2 * 10**6), others) == 5 + 50
    assert seconds_left(had(1), others) == 5 + 50
