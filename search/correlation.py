"""How well a rung says what the next one will find, estimated without the bias of selection.

Only those that climbed are known at both rungs, and most climbed because they did well. After the
first (``pareto.EARLY``) every one that would have been stopped had the same chance to go on all the
same (``pareto.by_chance``): it stands for 1 / CHANCE of its kind, one that climbed by its rank for
itself alone (weights by inverse probability: Horvitz and Thompson 1952).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..spaces.parameter import RUNGS
from .pareto import CHANCE, EARLY
from .record import Entry

ENOUGH = 10  # pairs by chance; fewer would each weigh too much
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Two rungs. pairs: policies known at both; by_chance: those of them that chance let through.
    spearman: rank correlation of the losses. partial: the same among policies of like latency
    (partial correlation of ranks, given latency's). None where it is not defined. biased: too few
    came by chance: these are the figures of those that climbed, as they are."""

    below: str
    above: str
    pairs: int
    by_chance: int
    spearman: float | None
    partial: float | None
    biased: bool


def agreements(entries: Sequence[Entry]) -> list[Agreement]:
    """Of each rung with the next, from the entries of a record."""
    known = (e for e in entries if e["kind"] == "result" and e.get("loss") is not None)
    newest = {(e["rung"], e["digest"]): e for e in known if e.get("latency_ms")}
    return [_agreement(newest, below, above) for below, above in pairwise(RUNGS)]


def _agreement(newest: dict[tuple[str, str], Entry], below: str, above: str) -> Agreement:
    pairs = [
        (entry, newest[above, digest])
        for (rung, digest), entry in newest.items()
        # What stopped and went on later is of the kind that those by chance stand for.
        if rung == below and (above, digest) in newest and entry.get("through", "rank")
    ]
    late = [(low, high) for low, high in pairs if low["trial"] >= EARLY]
    biased = sum(low.get("through") == "chance" for low, _ in late) < ENOUGH
    pairs = pairs if biased else late
    chance = np.array([low.get("through") == "chance" for low, _ in pairs], bool)
    weights = np.ones(len(pairs)) if biased else np.where(chance, 1 / CHANCE, 1.0)
    columns = [(low["loss"], high["loss"], low["latency_ms"][1]) for low, high in pairs]
    found = rank_correlations(np.array(columns, float).reshape(-1, 3), weights)
    return Agreement(below, above, len(pairs), int(chance.sum()), *found, biased)


def rank_correlations(columns: Numbers, weights: Numbers) -> tuple[float | None, float | None]:
    """Spearman's correlation of the first two ``columns``, and the partial one given the third.

    columns: (n, 3). weights: (n,), how many each row stands for. None where a column is constant,
    or where the third tells all of another.
    """
    if len(columns) < 3:
        return None, None
    ranks = [_ranks(column, weights) for column in columns.T]
    covariance: Numbers = np.cov(ranks, aweights=weights, ddof=0)
    deviation = np.sqrt(covariance.diagonal())
    varies = deviation > 1e-9 * weights.sum()
    if not varies[:2].all():
        return None, None
    ab = covariance[0, 1] / (deviation[0] * deviation[1])
    if not varies[2]:
        return float(ab), None
    ac, bc = covariance[:2, 2] / (deviation[:2] * deviation[2])
    left = (1 - ac**2) * (1 - bc**2)
    return float(ab), float((ab - ac * bc) / np.sqrt(left)) if left > 1e-12 else None


def _ranks(values: Numbers, weights: Numbers) -> Numbers:
    """Mid-ranks among as many as the ``weights`` stand for."""
    _, which = np.unique(values, return_inverse=True)
    held = np.bincount(which, weights)
    ranks: Numbers = (np.cumsum(held) - held / 2)[which]
    return ranks
