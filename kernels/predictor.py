"""The latency predictor: blueprint to milliseconds with an interval, from a device profile."""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Self

import numpy as np

from ..spaces.blueprint import Blueprint
from ..spaces.errors import BadInput
from .additive import AdditiveProcess, Array, Counts
from .pieces import AdditivePieces, Ints, Pieces
from .profile import DeviceProfile, Timed
from .signature import SESSION, Signature, by_kernel, signature
from .transfer import TransferredProcess

LEVEL = 0.9
LEAST = 20  # networks without which nothing can be said
LEAST_LIKE = 8  # the same where another device says most
SESSIONS = 3  # of at least so many networks: fewer say nothing of how they differ
# How much wider intervals are then. On the digits one session of 96 networks held 82% instead of
# 90% of those of other sessions: 1.23 times too narrow, were errors Gaussian.
ALONE = 1.25
FOREIGN = 3.0  # how much wider intervals are for a device that was not measured


def least(profile: DeviceProfile) -> int:
    """The networks without which ``profile`` says nothing, or one session of it."""
    return LEAST if profile.like is None else LEAST_LIKE


def enough(profile: DeviceProfile) -> list[Timed]:
    """The networks of ``profile`` that ran. Raises BadInput if they are too few to predict from."""
    found = [t for t in profile.timed if t.ms is not None]
    if len(found) < least(profile):
        raise BadInput(
            f"a device profile needs at least {least(profile)} timed networks, but this one has "
            f"{len(found)}; let `flyweight profile` go on with it"
        )
    return found


def large_sessions(timed: Sequence[Timed], enough: int) -> set[int]:
    """The sessions of enough networks to say how sessions differ; that takes ``SESSIONS``."""
    sizes = Counter(t.session for t in timed)
    return {session for session, size in sizes.items() if size >= enough}


@dataclass(frozen=True)
class KernelTime:
    """What one kernel takes, the handing over of its output included.

    name: the kernel's, "" for what a call takes whatever the network is. kind: of its work, "conv"
    or "depthwise". work: its signatures. deviation_ms: the standard deviation of ``ms``.
    """

    name: str
    kind: str
    precision: str
    work: Counts
    ms: float
    deviation_ms: float


class LatencyPredictor:
    """Predicts for the device of ``profile``; ``widen`` multiplies every interval.

    A machine is now faster, now slower, and the teacher with it; so networks are learned in units
    of the teacher that was timed beside them, and ``teacher_ms`` says what it takes now. Without
    it, it takes what it took in the profile.

    Intervals are conformal (Vovk et al. 2005): as many standard deviations wide as were needed to
    hold 90% of the networks of all sessions that are not small, each predicted from the other
    sessions. So what differs from one process to the next (memory, neighbours) is in them; with
    fewer than ``SESSIONS`` of them that can only be allowed for. They widen by themselves where the
    profile knows little. A profile that leans on another device's needs ``LEAST_LIKE`` networks
    only; its intervals are as many standard deviations wide as those of the other at least. Where
    its own networks predict one another better without the other's, they are left to themselves:
    kernels may differ by more than factors.

    Raises BadInput for a profile of too few networks.
    """

    def __init__(
        self, profile: DeviceProfile, teacher_ms: float | None = None, widen: float = 1.0
    ) -> None:
        self._timed = enough(profile)
        self._least = least(profile)
        self._unavailable = profile.unavailable()
        self._widen = widen
        usual = median(t.teacher_ms for t in self._timed)
        self.teacher_ms = teacher_ms or usual
        self._pace = self.teacher_ms / usual
        # Latencies as they would be if the teacher always took its usual time.
        ms = [t.ms * usual / t.teacher_ms for t in self._timed if t.ms]
        sums = [t.counts for t in self._timed]
        self._like = None if profile.like is None else LatencyPredictor(profile.like)
        self._process: AdditiveProcess | TransferredProcess = AdditiveProcess(
            sums, ms, [t.beside for t in self._timed]
        )
        if self._like is not None:
            lent = TransferredProcess(sums, ms, self._like._process)
            if _off(lent) <= _off(self._process):
                self._process = lent
        self._pieces = self.pieces()

    @cached_property
    def _deviations(self) -> float:
        """Standard deviations from the middle of an interval to its ends."""
        large = large_sessions(self._timed, self._least)
        across = len(large) >= SESSIONS
        groups = [t.session if across else i for i, t in enumerate(self._timed)]
        mean, deviation = self._process.left_out(groups)
        scores = np.abs(self._process.ms - mean) / deviation
        if across:  # a small session has to predict all others, and says little by itself
            scores = scores[[t.session in large for t in self._timed]]
        rank = min(len(scores), math.ceil(LEVEL * (len(scores) + 1)))
        found = float(np.sort(scores)[rank - 1])
        if self._like is not None:  # few networks may agree by chance
            found = max(found, self._like._deviations)
        return found * self._widen * (1.0 if across else ALONE)

    def predict(self, plans: Sequence[Blueprint]) -> Array:
        """[plans, 3]: lower end, middle and upper end of the latency in ms. Infinite for a plan
        with work that the runtime is known to die of."""
        return self.predict_work([signature(plan) for plan in plans])

    def predict_work(self, sums: Sequence[Counts]) -> Array:
        """The same for the signatures of plans."""
        if self._pieces.full:
            self._pieces = self.pieces()
        return self.predict_pieces(self._pieces, self._pieces.numbers(sums))

    def pieces(self) -> Pieces:
        """What ``predict_pieces`` takes numbers of, still empty."""
        if isinstance(self._process, AdditiveProcess):
            return AdditivePieces(self._process)
        return Pieces(self._process)

    def predict_pieces(self, pieces: Pieces, numbers: Ints) -> Array:
        """The same for plans of the ``pieces`` with the ``numbers`` [plans, pieces]; 0 is none."""
        mean, deviation = pieces.predict(numbers)
        half = self._deviations * deviation
        out = self._pace * np.maximum(np.stack([mean - half, mean, mean + half], 1), 0)
        if self._unavailable:
            deadly = [any(map(self._dies_of, both)) for both in pieces]
            out[np.array([False, *deadly])[numbers].any(1)] = np.inf
        return out

    def parts(self, plan: Blueprint) -> list[KernelTime]:
        """What each kernel takes, in execution order, behind what a call takes by itself. Together
        they are the middle of the prediction. No kernel was timed alone: what is known of one is
        known from networks that differ in it, so its deviation may be large where that of the
        whole is not."""
        heads = [("", "session", "", Counter([SESSION]))]
        for kernel, work, handover in by_kernel(plan):
            kind = work.kind.rpartition(" ")[0]
            heads.append((kernel.name, kind, kernel.precision, Counter([work, handover])))
        times = self.times([work for *_, work in heads]).tolist()
        return [KernelTime(*head, *time) for head, time in zip(heads, times, strict=True)]

    def changes(self, pairs: Sequence[tuple[Blueprint, Blueprint]]) -> Array:
        """[pairs, 2]: how many ms the second of each takes more than the first, and the standard
        deviation of that, to which what both have in common adds nothing. Infinite where either has
        work that the runtime is known to die of."""
        if not pairs:
            return np.zeros((0, 2))
        sums = [(signature(before), signature(after)) for before, after in pairs]
        more = [after - before for before, after in sums]
        less = [before - after for before, after in sums]
        both = [plus + minus for plus, minus in zip(more, less, strict=True)]
        plus, minus, all_ = np.split(self.times([*more, *less, *both]), 3)
        # (a - b)^2 = 2 a^2 + 2 b^2 - (a + b)^2: deviations of sums are all that is asked for.
        squares = 2 * plus[:, 1] ** 2 + 2 * minus[:, 1] ** 2 - all_[:, 1] ** 2
        out = np.stack([plus[:, 0] - minus[:, 0], np.sqrt(np.maximum(squares, 0))], 1)
        out[[any(map(self._deadly, pair)) for pair in sums]] = np.inf
        return out

    def times(self, sums: Sequence[Counts]) -> Array:
        """[sums, 2]: what some of the work of a network takes in ms, and the standard deviation."""
        mean, deviation = self._process.predict(sums)
        return self._pace * np.stack([mean, self._widen * deviation], 1)

    def beside(self, teacher_ms: float) -> Self:
        """The same predictor for a machine on which the teacher takes ``teacher_ms``."""
        other = copy.copy(self)
        other._pace *= teacher_ms / self.teacher_ms
        other.teacher_ms = teacher_ms
        return other

    def _deadly(self, counts: Counts) -> bool:
        return any(map(self._dies_of, counts))

    def _dies_of(self, piece: Signature) -> bool:
        return not self._unavailable.isdisjoint(((piece.kind, piece.form), piece))


def _off(process: AdditiveProcess | TransferredProcess) -> float:
    """By how much each of its networks is mispredicted by the others, on average."""
    mean, _ = process.left_out(range(len(process.ms)))
    return float(np.abs(mean / process.ms - 1).mean())


def check_own(profile: DeviceProfile, fingerprint: str) -> None:
    """Raises BadInput unless ``profile`` is of the device that is the target."""
    if profile.fingerprint == fingerprint:
        return
    raise BadInput(
        f"the profile is of device {profile.told()}, but the target is {fingerprint}; make one on "
        "the target with `flyweight profile`, where a few networks are enough with --like this one "
        "(`flyweight predict` takes this one with --allow-foreign, for wider intervals that "
        "promise nothing)"
    )


def predictor_for(
    profile: DeviceProfile,
    fingerprint: str,
    teacher_ms: float | None = None,
    allow_foreign: bool = False,
) -> LatencyPredictor:
    """The predictor for a device. Raises BadInput if ``profile`` is of another one, unless that is
    allowed: then with wider intervals."""
    if not allow_foreign:
        check_own(profile, fingerprint)
    own = profile.fingerprint == fingerprint
    return LatencyPredictor(profile, teacher_ms, 1.0 if own else FOREIGN)
