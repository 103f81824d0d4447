"""How long a trial still takes, by what rungs took others and what is known of the trial itself."""

import math
import statistics
from collections.abc import Mapping, Sequence

from ..compressors import RUNGS
from .record import Entry

NEAR = 9  # others whose networks are as much work say how long a rung takes: a third, at most these

Results = Mapping[str, Entry]  # of one trial: rung -> its result


def seconds_left(
    own: Results, others: Mapping[str, Sequence[Results]], longer: float | None = None
) -> float | None:
    """Seconds of the rungs that a trial with the results ``own`` has not had yet, None if nobody
    knows. others: for each rung those who have had it. longer: the training of the full rung, in
    that of the short one, for a first full rung."""
    if RUNGS[1] not in own and own.get(RUNGS[0], {}).get("settled"):
        return float(own[RUNGS[0]]["rung_seconds"])  # it is built and scored once more
    found: dict[str, float] = {}
    for rung in RUNGS[len(own) :]:
        seconds = _like_others(rung, own, others[rung])
        if seconds is None and rung == RUNGS[-1]:
            seconds = _alone(own, found, longer)
        if seconds is None:
            return None
        found[rung] = seconds
    return sum(found.values())


def _like_others(rung: str, own: Results, others: Sequence[Results]) -> float | None:
    """The median of ``others``. What is settled is trained no more: only others that were say how
    long that takes; before the trial knows whether it is, all do. One that begins may be the least
    of those that are trained; its first rung costs little, and behind it more is known."""
    before = RUNGS[max(0, RUNGS.index(rung) - 1)]
    trains = before in own and not own[before].get("settled")
    if before in own:
        others = [o for o in others if bool(o[before].get("settled")) != trains]
    if not own:
        trained = [o for o in others if not o[rung].get("settled")] or others
        return min((float(o[rung]["rung_seconds"]) for o in trained), default=None)
    if not others:
        return None
    if rung == RUNGS[-1] and trains and all(o[before]["rung_seconds"] for o in (own, *others)):
        # Both rungs train: who is slow at the one is slow at the other.
        shares = [o[rung]["rung_seconds"] / o[before]["rung_seconds"] for o in others]
        return float(own[before]["rung_seconds"] * statistics.median(shares))
    return float(statistics.median(o[rung]["rung_seconds"] for o in _near(own, others)))


def _near(own: Results, others: Sequence[Results]) -> Sequence[Results]:
    """Those whose networks are as much work as the trial's; all where that is not known."""
    work, *theirs = (o.get(RUNGS[0], {}).get("macs") for o in (own, *others))
    if not work or not all(theirs):
        return others
    nearest = sorted(others, key=lambda o: abs(math.log(o[RUNGS[0]]["macs"] / work)))
    return nearest[: min(NEAR, 1 + len(others) // 3)]


def _alone(own: Results, found: Mapping[str, float], longer: float | None) -> float | None:
    """The full rung, where none like it was had. What is trained no more is built and scored, as
    at its first rung."""
    short = own.get(RUNGS[1])
    if short and short.get("settled"):
        return float(own[RUNGS[0]]["rung_seconds"])
    if longer is None:
        return None
    return longer * float(short["rung_seconds"] if short else found[RUNGS[1]])
