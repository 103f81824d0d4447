"""Makes a device profile for a space: networks of random policies, timed alone on this device."""

import math
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ..compressors import Prepared, untrained
from ..kernels import (
    DeviceProfile,
    LatencyPredictor,
    MeasuringProcess,
    Timed,
    Timing,
    disturbed,
    signature,
)
from ..kernels.timing import TEACHER
from ..spaces import BadInput, Blueprint, FlyweightError, Impossible, Policy, Space, blueprint
from .ready import Ready

GROUP = 8  # networks timed side by side
SESSION = 12  # groups timed in one process; the next has other memory
NARROW = 0.06  # the median width of an interval, relative, at which a profile is good enough
NETWORKS = 960  # at most
SESSIONS = 3  # at least: intervals are calibrated on what differs from one to the next
UNSEEN = 99  # networks whose intervals are looked at
AGAIN = 3  # times that a group is timed while the machine is not quiet
QUIET = 1.1  # times the teacher's fastest group
NOISY = 0.5  # share of groups that were not quiet, from which on a profile is refused

Say = Callable[[str], None]


def mixed_policies(space: Space, seed: int) -> Iterator[Policy]:
    """Policies as a search meets them, without end: as many in each precision as mixed, of each two
    with random widths and one near a uniform recipe."""
    rng = random.Random(f"profile {seed}")
    while True:
        for near in (False, False, True):
            for precision in ("fp32", "int8", None):
                yield _one(space, rng, near, precision)


def _one(space: Space, rng: random.Random, near: bool, precision: str | None) -> Policy:
    values = {p.name: p.sample(rng) for p in space.parameters}
    if near:
        keep = rng.uniform(space.settings.min_keep, 1)
        for name, choices in space.widths.items():
            wish = keep * space.groups[name][1].width
            nearest = int(np.argmin([abs(choice - wish) for choice in choices]))
            at = nearest + rng.choice((-1, 0, 0, 1))
            values[f"width/{name}"] = choices[min(max(at, 0), len(choices) - 1)]
    most_int8 = 0.8 if near else 0.5
    for name, known in space.precisions.items():
        wanted = precision or ("int8" if rng.random() < most_int8 else "fp32")
        values[f"precision/{name}"] = wanted if wanted in known else known[0]
    return space.policy(values)


def make_profile(
    ready: Ready,
    path: Path,
    *,
    networks: int = NETWORKS,
    seconds: float = math.inf,
    narrow: float = NARROW,
    seed: int = 0,
    say: Say = print,
    count: Callable[[int], None] = lambda _: None,
) -> DeviceProfile:
    """Times networks of the space of ``ready`` into ``path`` until the median width of an interval
    is ``narrow``, or ``networks`` are timed, or ``seconds`` are over. Goes on with what is in
    ``path`` already. count: told how many are timed.

    Nothing else may run on the device meanwhile. Raises BadInput if ``path`` is of another device
    or request, FlyweightError if the machine is too busy to be profiled.
    """
    runtime, request = ready.prepared.runtime, ready.request()
    shapes = {name: tuple(value.shape) for name, value in request.items()}
    profile = DeviceProfile(runtime.device, runtime.fingerprint, shapes)
    if path.exists():
        profile = DeviceProfile.load(path)
        _check(profile, runtime.fingerprint, shapes, path)
    profile.create(path)  # without a line that was cut off
    ends = time.monotonic() + seconds
    policies = islice(mixed_policies(ready.space, seed), len(profile.timed), None)
    session = max((t.session for t in profile.timed), default=-1)
    quiet = _Quiet()
    while len(profile.timed) < networks and _wide(ready, profile, seed, narrow, say):
        session += 1
        target = ready.spec.target
        with MeasuringProcess(target.runtime, target.threads, ready.teacher, request) as process:
            for _ in range(SESSION):
                group = list(islice(policies, min(GROUP, networks - len(profile.timed))))
                if not group or time.monotonic() > ends:
                    return profile
                for timed in _time(ready, process, group, session, quiet):
                    profile.append(path, timed)
                count(len(profile.timed))
        quiet.check()
    return profile


class _Quiet:
    """Whether the machine lets us measure, judged by the teacher."""

    def __init__(self) -> None:
        self.fastest = float("inf")
        self.groups = self.noisy = 0

    def __call__(self, timings: dict[str, Timing]) -> bool:
        took = timings[TEACHER].median_ms
        self.fastest = min(self.fastest, took)
        return took <= QUIET * self.fastest and not disturbed(timings)

    def check(self) -> None:
        if self.noisy > NOISY * self.groups:
            raise FlyweightError(
                f"this machine is too busy to be profiled: in {self.noisy} of {self.groups} groups "
                f"the teacher took more than {QUIET:g} x its fastest ({self.fastest:.4f} ms), or "
                "waited for a core; stop what else runs here, then go on with the same command"
            )


def plan_of(prepared: Prepared, policy: Policy) -> Blueprint:
    """The blueprint of ``policy``. Raises Impossible."""
    start = prepared.start(policy)
    return blueprint(start.network, policy, prepared.runtime.capabilities)


def _time(
    ready: Ready, process: MeasuringProcess, group: list[Policy], session: int, quiet: _Quiet
) -> Iterator[Timed]:
    """The networks of ``group`` on the device; a policy that cannot be built is left out."""
    plans, models = {}, {}
    for policy in group:
        try:
            models[policy.digest] = untrained(ready.prepared, policy)
        except Impossible:
            continue
        plans[policy.digest] = plan_of(ready.prepared, policy)
    tries = []
    for _ in range(AGAIN):
        found = process.time(models)
        alive = {name: timing for name, timing in found.items() if timing is not None}
        tries.append((alive[TEACHER].median_ms, found))
        if calm := quiet(alive):
            break
    quiet.groups += 1
    quiet.noisy += not calm
    teacher_ms, found = min(tries, key=lambda t: t[0])
    for digest, plan in plans.items():
        timing = found[digest]
        ms = timing.median_ms if timing else None
        yield Timed(signature(plan), ms, teacher_ms, session, digest)


def _wide(ready: Ready, profile: DeviceProfile, seed: int, narrow: float, say: Say) -> bool:
    """Whether intervals of networks that are not in the profile are wider than is wanted."""
    if not narrow or len({t.session for t in profile.timed}) < SESSIONS:
        return True
    unseen = islice(mixed_policies(ready.space, seed - 1), UNSEEN)
    plans = [plan_of(ready.prepared, policy) for policy in unseen]
    ends = LatencyPredictor(profile).predict(plans)
    width = float(np.median((ends[:, 2] - ends[:, 0]) / ends[:, 1]))
    say(f"90% intervals are {100 * width:.1f}% wide (enough: {100 * narrow:g}%)")
    return width > narrow


def _check(
    profile: DeviceProfile, fingerprint: str, shapes: dict[str, tuple[int, ...]], path: Path
) -> None:
    if profile.fingerprint != fingerprint:
        raise BadInput(
            f"{path} is the profile of device {profile.fingerprint}, but this one is "
            f"{fingerprint}; write to another file"
        )
    if dict(profile.request) != shapes:
        raise BadInput(
            f"{path} was made for requests of {dict(profile.request)}, but this task's are "
            f"{shapes}; write to another file"
        )
