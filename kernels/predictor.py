"""The latency predictor: blueprint to milliseconds with an interval, from a device profile."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from statistics import median

import numpy as np

from ..spaces.blueprint import Blueprint
from ..spaces.errors import BadInput
from .additive import AdditiveProcess, Array, Counts
from .profile import DeviceProfile, Timed
from .signature import signature
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


def large_sessions(timed: Sequence[Timed], enough: int) -> set[int]:
    """The sessions of enough networks to say how sessions differ; that takes ``SESSIONS``."""
    sizes = Counter(t.session for t in timed)
    return {session for session, size in sizes.items() if size >= enough}


class LatencyPredictor:
    """Predicts for the device of ``profile``; ``widen`` multiplies every interval.

    A machine is now faster, now slower, and the teacher with it; so networks are learned in units
    of the teacher in the same session (its median), and ``teacher_ms`` says what it takes now.
    Without it, it takes what it took in the profile.

    Intervals are conformal (Vovk et al. 2005): as many standard deviations wide as were needed to
    hold 90% of the networks of each session of the profile, predicted from the other sessions. So
    what differs from one process to the next (memory, neighbours) is in them; with fewer than
    ``SESSIONS`` of them that can only be allowed for. They widen by themselves where the profile
    knows little. A profile that leans on another device's needs ``LEAST_LIKE`` networks only; its
    intervals are as many standard deviations wide as those of the other at least.

    Raises BadInput for a profile of too few networks.
    """

    def __init__(
        self, profile: DeviceProfile, teacher_ms: float | None = None, widen: float = 1.0
    ) -> None:
        self._timed = [t for t in profile.timed if t.ms is not None]
        self._least = least(profile)
        if len(self._timed) < self._least:
            raise BadInput(
                f"a device profile needs at least {self._least} timed networks, but this one has "
                f"{len(self._timed)}; let `flyweight profile` go on with it"
            )
        self._unavailable = profile.unavailable()
        self._widen = widen
        self._sessions = {
            session: median(t.teacher_ms for t in self._timed if t.session == session)
            for session in sorted({t.session for t in self._timed})
        }
        usual = median(self._sessions.values())
        self.teacher_ms = teacher_ms or usual
        self._pace = self.teacher_ms / usual
        # Latencies as they would be if the teacher always took its usual time.
        ms = [t.ms * usual / self._sessions[t.session] for t in self._timed if t.ms]
        sums = [t.counts for t in self._timed]
        self._like = None if profile.like is None else LatencyPredictor(profile.like)
        self._process: AdditiveProcess | TransferredProcess = (
            AdditiveProcess(sums, ms)
            if self._like is None
            else TransferredProcess(sums, ms, self._like._process)
        )

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
        if not sums:
            return np.zeros((0, 3))
        mean, deviation = self._process.predict(sums)
        half = self._deviations * deviation
        out = self._pace * np.maximum(np.stack([mean - half, mean, mean + half], 1), 0)
        if self._unavailable:
            deadly = [any((s.kind, s.form) in self._unavailable for s in c) for c in sums]
            out[deadly] = np.inf
        return out


def predictor_for(
    profile: DeviceProfile,
    fingerprint: str,
    teacher_ms: float | None = None,
    allow_foreign: bool = False,
) -> LatencyPredictor:
    """The predictor for a device. Raises BadInput if ``profile`` is of another one, unless that is
    allowed: then with wider intervals."""
    if profile.fingerprint == fingerprint:
        return LatencyPredictor(profile, teacher_ms)
    if not allow_foreign:
        known = ", ".join(f"{k}={v}" for k, v in profile.device.items())
        raise BadInput(
            f"the profile is of device {profile.fingerprint} ({known}), but the target is "
            f"{fingerprint}; make one on the target with `flyweight profile`, where a few networks "
            "are enough with --like this one (`flyweight predict` takes this one with "
            "--allow-foreign, for wider intervals that promise nothing)"
        )
    return LatencyPredictor(profile, teacher_ms, FOREIGN)
