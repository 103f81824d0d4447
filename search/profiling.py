"""Makes a device profile for a space: networks of random policies, timed alone on this device."""

import contextlib
import fcntl
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np

from ..compressors import Prepared, untrained
from ..kernels import (
    DeviceProfile,
    LatencyPredictor,
    Signature,
    Timed,
    Timing,
    signature,
)
from ..kernels.predictor import LEAST, SESSIONS, check_own, large_sessions, least
from ..kernels.signature import digest
from ..kernels.timing import TEACHER
from ..spaces import BadInput, FlyweightError, Policy, Space
from .meter import Device, ThisMachine, noisy
from .ready import Ready, request_of
from .spec import Spec

GROUP = 8  # networks timed side by side
SESSION = 12  # groups timed in one process at most; the next has other memory
NARROW = 0.04  # the median width of an interval, relative, at which a profile is good enough
NETWORKS = 960  # at most
FEW = 24  # at most, of a device that is profiled like another
UNSEEN = 99  # networks whose intervals are looked at
AGAIN = 3  # times that a group is timed while the machine is not quiet
QUIET = 1.1  # times the teacher's fastest group
NOISY = 0.75  # share of groups that were not quiet, from which on a profile is refused
MISSES = 500  # policies one after another whose work is known, until a space has no others

Say = Callable[[str], None]


class Process(Protocol):
    """What a ``MeasuringProcess`` does, wherever it stands."""

    def time(self, models: Mapping[str, bytes], /) -> dict[str, Timing | None]:
        """See ``MeasuringProcess.time``."""


class Bench(Protocol):
    """A device with processes that time networks on it."""

    device: Device

    def process(self) -> AbstractContextManager[Process]:
        """A session of the runtime, with memory of its own."""


Network = tuple[Counter[Signature], bytes]  # its work and its model
Work = frozenset[tuple[Signature, int]]


def mixed_policies(space: Space, seed: int | str) -> Iterator[Policy]:
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
    place: Bench | None = None,
    like: DeviceProfile | None = None,
    networks: int = NETWORKS,
    seconds: float = math.inf,
    narrow: float = NARROW,
    seed: int = 0,
    policies: Iterator[Policy] | None = None,
    say: Say = print,
    count: Callable[[int], None] = lambda _: None,
) -> DeviceProfile:
    """Times networks of the space of ``ready`` into ``path`` until the median width of an interval
    is ``narrow``, or ``networks`` are timed, or ``seconds`` are over, or the space has no others.
    Goes on with what is in ``path`` already. place: where to time them, by default on this machine.
    policies: what is timed of the space, by default ``mixed_policies`` by ``seed``. count: told how
    many are timed. like: the profile of another device, which tells most: ``FEW`` networks are
    enough then.

    Nothing else may run there meanwhile. Raises BadInput if ``path`` is of another device,
    request or network or ``like`` cannot be leaned on, FlyweightError if the machine is too busy to
    be profiled.
    """
    target = ready.spec.target
    if place is None:
        place = ThisMachine(target.runtime, target.threads, ready.teacher, ready.request())
    profile = empty_profile(ready.spec, ready.prepared, place.device)
    if path.exists():
        found = DeviceProfile.load(path)
        check_profile(found, profile)
        profile = found
    if like is not None:
        lean(profile, like)
    profile.create(path)  # without a line that was cut off
    ends = time.monotonic() + seconds
    groups = max(LEAST // GROUP + 1, min(SESSION, networks // (GROUP * SESSIONS)))
    if profile.like is not None:
        # What the other profile does not know is to show, and what is one process's not to count.
        seed, groups = -2 - seed, 1
    unseen = _unseen(ready, profile, policies or mixed_policies(ready.space, seed))
    session = max((t.session for t in profile.timed), default=-1)
    quiet = _Quiet()
    while len(profile.timed) < networks and _wide(ready, profile, narrow, say):
        session += 1
        quiet.begin()
        with place.process() as process:
            for _ in range(groups):
                group = dict(islice(unseen, min(GROUP, networks - len(profile.timed))))
                if not group or time.monotonic() > ends:
                    break
                for timed in _time(ready, process, group, session, quiet):
                    profile.append(path, timed)
                count(len(profile.timed))
        quiet.check()
        if not group and len(profile.timed) < networks and time.monotonic() <= ends:
            say("The space has no further networks")
            break
        if time.monotonic() > ends:
            say("The time is over")
            break
    return profile


def empty_profile(spec: Spec, prepared: Prepared, device: Device | None = None) -> DeviceProfile:
    """A profile of nothing yet, on ``device`` (by default this one), for the requests and the
    teacher of a task."""
    shapes = {name: tuple(value.shape) for name, value in request_of(spec, prepared).items()}
    device = device or Device.of(prepared.runtime)
    teacher = signature(prepared.plan(Policy()))
    return DeviceProfile(
        device.facts, device.fingerprint, shapes, digest(teacher), weight_bits=device.weight_bits
    )


def lean(profile: DeviceProfile, like: DeviceProfile) -> None:
    """``profile`` leans on ``like`` from now on. Raises BadInput where it cannot."""
    check_profile(like, profile, device=False)
    if like.fingerprint == profile.fingerprint:
        raise BadInput(
            f"the profile to be like is of this device itself, {like.told()}: go on with it, "
            "`flyweight profile -o` its file"
        )
    if like.like is not None:
        raise BadInput(
            f"the profile to be like is itself made like that of {like.like.told()}: name that one"
        )
    if profile.like is not None and profile.like.fingerprint != like.fingerprint:
        raise BadInput(
            f"this profile was begun like that of {profile.like.told()}, not {like.told()}; write "
            "to another file"
        )
    if (count := sum(t.ms is not None for t in like.timed)) < LEAST:
        raise BadInput(
            f"the profile to be like needs at least {LEAST} timed networks, but has {count}; let "
            "`flyweight profile` go on with it on its own device"
        )
    profile.like = like


def _unseen(
    ready: Ready, profile: DeviceProfile, policies: Iterator[Policy]
) -> Iterator[tuple[str, Network]]:
    """Those of ``policies`` whose work is in neither ``profile`` nor before, until none are found,
    by digest."""
    known = _known(profile)
    misses = -len(known)  # those of ``profile`` come first, if it goes on
    for policy in policies:
        misses += 1
        if misses > MISSES:
            return
        try:
            counts = signature(ready.prepared.plan(policy))
            if (key := frozenset(counts.items())) in known:
                continue
            known.add(key)
            network = counts, untrained(ready.prepared, policy)
        except Exception:  # Impossible, or what nobody foresaw of it: others may do
            continue
        yield policy.digest, network
        misses = 0


def _known(profile: DeviceProfile) -> set[Work]:
    return {frozenset(t.counts.items()) for t in profile.timed}


class _Quiet:
    """Whether the machine lets us measure, judged by the teacher."""

    def __init__(self) -> None:
        self.groups = self.noisy = 0
        self.begin()

    def begin(self) -> None:
        """Another process, with a teacher of its own."""
        self.fastest = math.inf

    def __call__(self, timings: dict[str, Timing], facts: Mapping[str, str]) -> bool:
        took = timings[TEACHER].median_ms
        self.fastest = min(self.fastest, took)
        return took <= QUIET * self.fastest and not noisy(timings, facts)

    def check(self) -> None:
        if self.noisy > NOISY * max(self.groups, SESSIONS):  # one group says little
            raise FlyweightError(
                f"this machine is too busy to be profiled: in {self.noisy} of {self.groups} groups "
                f"the teacher took more than {QUIET:g} x its fastest ({self.fastest:.4f} ms), or "
                "waited for a core; stop what else runs here, then go on with the same command"
            )


def _time(
    ready: Ready,
    process: Process,
    group: Mapping[str, Network],
    session: int,
    quiet: _Quiet,
) -> Iterator[Timed]:
    """The networks of ``group`` on the device; none if the machine would not be quiet."""
    models = {name: model for name, (_, model) in group.items()}
    quiet.groups += 1
    for _ in range(AGAIN):
        found = process.time(models)
        alive = {name: timing for name, timing in found.items() if timing is not None}
        if quiet(alive, ready.prepared.runtime.device):
            break
    else:
        quiet.noisy += 1
        return
    for name, (counts, _) in group.items():
        timing = found[name]
        ms = timing.median_ms if timing else None
        yield Timed(counts, ms, alive[TEACHER].median_ms, session, name)


def _wide(ready: Ready, profile: DeviceProfile, narrow: float, say: Say) -> bool:
    """Whether intervals of networks that are not in the profile are wider than is wanted."""
    alive = [t for t in profile.timed if t.ms is not None]
    if not narrow or len(large_sessions(alive, least(profile))) < SESSIONS:
        return True
    drawn = islice(mixed_policies(ready.space, "unseen"), UNSEEN)  # as no seed draws
    works = [signature(ready.prepared.plan(policy)) for policy in drawn]
    known = _known(profile)
    unseen = [counts for counts in works if frozenset(counts.items()) not in known]
    if not unseen:  # of a small space
        return True
    ends = LatencyPredictor(profile).predict_work(unseen)
    ends = ends[np.isfinite(ends).all(1)]
    width = float(np.median((ends[:, 2] - ends[:, 0]) / ends[:, 1])) if len(ends) else math.inf
    say(f"90% intervals are {100 * width:.1f}% wide (enough: {100 * narrow:g}%)")
    return not width <= narrow


@contextlib.contextmanager
def writing(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """One process at a time writes the profile ``path``. Raises BadInput in another that has waited
    for so long. By a file beside it: the profile itself is replaced as it begins."""
    beside, ends = path.with_name(f".{path.name}.lock"), time.monotonic() + patience_s
    while (lock := _alone(beside)) is None:
        if time.monotonic() >= ends:
            raise BadInput(
                f"another process is writing {path} (`flyweight profile`, or a search that ends); "
                "wait for it, or name another file"
            )
        time.sleep(0.1)
    with lock:
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


def _alone(path: Path) -> TextIO | None:
    """The file ``path``, which no other process has now; None if one has."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError:  # a network drive without locks
        return file
    else:
        if os.fstat(file.fileno()).st_nlink:  # else who had it has just ended
            return file
    file.close()
    return None


def check_device(found: DeviceProfile, ready: Ready, local: bool) -> None:
    """Raises BadInput where a search could not do with ``found``, which its spec names, for the
    device that it is of: on one machine, ``local``, that of another one says nothing of where
    finalists are measured; elsewhere int8 artifacts must be made for its kernels."""
    runtime = ready.prepared.runtime
    bits = runtime.capabilities.weight_bits
    if local:
        check_own(found, runtime.fingerprint)
    elif "int8" in ready.spec.space.quantize.precisions and found.weight_bits != bits:
        raise BadInput(
            f"target.profile: its device {found.told()} bears int8 weights of "
            f"{found.weight_bits} bits, this machine those of {bits}: artifacts would be quantized "
            "for this one. Run the search from a machine whose CPU is like the target's, or let "
            "space.quantize.precisions be [fp32]"
        )


def check_profile(found: DeviceProfile, wanted: DeviceProfile, device: bool = True) -> None:
    """Raises BadInput unless ``found`` is of the requests and the network of ``wanted``, and, if
    ``device``, of its device."""
    if device and found.fingerprint != wanted.fingerprint:
        raise BadInput(
            f"the profile is of device {found.told()}, but this one is {wanted.told()}; write to "
            "another file"
        )
    if dict(found.request) != dict(wanted.request):
        raise BadInput(
            f"the profile is of requests of {dict(found.request)}, but this task's are "
            f"{dict(wanted.request)}; make another with `flyweight profile -o FILE`"
        )
    if found.network != wanted.network:
        raise BadInput(
            f"the profile was made for another network ({found.network}) than this task's "
            f"({wanted.network}), or by another flyweight; make another with `flyweight profile -o "
            "FILE`"
        )
