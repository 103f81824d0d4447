"""What a search finds out before its first trial, so that its trials are worth their training: a
device profile, the sensitivity table, and the policies that these two give."""

import contextlib
import time
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from ..kernels import DeviceProfile, LatencyPredictor, signature
from ..kernels.measuring import CALLS_EACH
from ..kernels.predictor import LEAST, enough
from ..kernels.signature import digest
from ..spaces import BadInput, Distill, FlyweightError, Policy
from .batch import BatchPredictor
from .cache import cache_folder, key_of
from .counting import counting
from .judges import Judges
from .limits import Limits
from .placement import Place
from .profiling import NETWORKS as MOST
from .profiling import check_profile, empty_profile, make_profile
from .ready import Ready
from .run_files import PROFILE, SENSITIVITY
from .sensitivity import Sensitivity, measure
from .sizes import Sizes
from .store import write_json
from .warm import WarmStart

WORTH = 15  # trials, from which on a search is worth preparing: fewer cost less themselves
# Shares of the time budget that the profile and the table may take, with what it takes to begin;
# seconds where there is no budget.
PROFILE_SHARE, PROFILE_S = 0.1, 300.0
TABLE_SHARE, TABLE_S = 0.1, 300.0
FOR_EACH = 4  # networks in the profile, for each trial


def worth_preparing(ready: Ready) -> bool:
    """Whether the search is long enough for what it learns beforehand to pay."""
    search = ready.spec.search
    return search.strategy in ("joint", "solver") and search.trials >= WORTH


@dataclass
class Preparation:
    """Finds out what can be, in the time that there is, and says in ``notes`` what could not.
    place: where networks are timed. spent_s: of the time budget, in earlier sessions."""

    ready: Ready
    place: Place
    run_dir: Path
    console: Console | None
    notes: list[str] = field(default_factory=list)
    spent_s: float = 0.0

    def found(self, teacher_ms: float, nothing_left: bool) -> DeviceProfile | None:
        """The device profile of the search, if it has one. It is made where the search is worth it;
        one that the run has already stays what its policies are priced by, also where it is not.
        nothing_left: whether none is made any more."""
        worth = worth_preparing(self.ready)
        if worth and not nothing_left:
            return self.profile(teacher_ms)
        return self.made() if worth or (self.run_dir / PROFILE).exists() else None

    def profile(self, teacher_ms: float) -> DeviceProfile | None:
        """The device profile of the place, gone on with from the cache; None if none can be made.
        It lies in the run directory, and in the cache for the next search of the same space.
        teacher_ms: what the teacher takes there."""
        ready, path = self.ready, self.run_dir / PROFILE
        torch.set_num_threads(1)  # what builds the networks must not spin while they are timed
        try:
            earlier = _loaded(self._kept, self._wanted)
            known = self._known(path, earlier)
            seconds = self._seconds(PROFILE_SHARE, PROFILE_S)
            # Even if all took half of what the teacher takes: they are smaller.
            if known < LEAST and seconds < LEAST * CALLS_EACH * teacher_ms / 2e3:
                self.notes.append(
                    f"No device profile: to time {LEAST} networks of a model of {teacher_ms:.0f} "
                    f"ms takes longer than the {seconds:.0f} s that there are for it. Each policy "
                    "is timed instead; let `flyweight profile` make one to name as target.profile"
                )
                return None
            more = min(MOST, FOR_EACH * ready.spec.search.trials)
            # Without one of this space what is known is of another: its intervals decide.
            networks = more if earlier else min(2 * MOST, known + more)
            with counting("Timing networks for the device profile", networks, self.console) as bar:
                make_profile(
                    ready, path, place=self.place, networks=networks,
                    seconds=seconds, seed=0,
                    say=lambda _: None, count=bar,
                )  # fmt: skip
        except (FlyweightError, OSError) as error:
            self.notes.append(f"The device profile is not complete: {error}")
        finally:  # also when it was interrupted
            self.keep()
        return self.made()

    def made(self) -> DeviceProfile | None:
        """The profile of the place that the run has; None if it is none that could be used."""
        try:
            found = DeviceProfile.load(self.run_dir / PROFILE)
            check_profile(found, self._wanted)
            enough(found)
        except BadInput as error:
            self.notes.append(f"No device profile: {error}. Each policy is timed instead.")
            return None
        return found

    def keep(self) -> None:
        """Copies the profile of the run to the cache, if it is of more networks than the one there.
        Losing it costs the next search time and nothing else."""
        found, earlier = (_loaded(p, self._wanted) for p in (self.run_dir / PROFILE, self._kept))
        if found and (earlier is None or len(found.timed) > len(earlier.timed)):
            with contextlib.suppress(OSError):
                found.create(self._kept)

    @cached_property
    def _wanted(self) -> DeviceProfile:
        return empty_profile(self.ready.spec, self.ready.prepared, self.place.device)

    @cached_property
    def _kept(self) -> Path:
        """The profile in the cache, of this space alone."""
        ready, wanted = self.ready, self._wanted
        request = {name: list(shape) for name, shape in wanted.request.items()}
        students = [Policy(distill=Distill(student=name)) for name in ready.prepared.others]
        others = [digest(signature(ready.prepared.plan(policy))) for policy in students]
        settings = repr(ready.space.settings)
        # Which kernels there are to be timed hangs on what can run in int8, and on our rules.
        kernels = [self.place.device.capabilities, version("flyweight")]
        name = key_of(wanted.fingerprint, kernels, request, wanted.network, settings, *others)
        return cache_folder(ready.spec) / f"profile-{name}.jsonl"

    def _known(self, path: Path, earlier: DeviceProfile | None) -> int:
        """How many networks ``path`` holds, taken from the ``earlier`` profile if need be. One that
        is not what is wanted, say of another batch size, is put aside. Raises OSError."""
        if path.exists():
            if found := _loaded(path, self._wanted):
                return len(found.timed)
            path.replace(path.with_stem(f"{path.stem}-{key_of(path.read_bytes())}"))
        if earlier is None:
            return 0
        earlier.create(path)
        return len(earlier.timed)

    def table(self) -> Sensitivity:
        """The sensitivity table, as far as it gets; also in RUN_DIR/sensitivity.json."""
        began = time.monotonic()
        with counting("Judging single choices", None, self.console) as bar:
            judges = Judges(self.ready, self._seconds(TABLE_SHARE, TABLE_S), bar)
            try:
                table = measure(self.ready.space, judges)
            finally:
                judges.close()
        if judges.failed:
            self.notes.append(f"Not all single choices could be judged: {judges.failed}")
        seconds = time.monotonic() - began
        try:
            write_json(self.run_dir / SENSITIVITY, table.to_dict() | {"seconds": seconds})
        except OSError as error:
            self.notes.append(f"The report will not say what is fragile: {error}")
        return table

    def warm_start(
        self, table: Sensitivity, predictor: LatencyPredictor, limits: Limits
    ) -> WarmStart | None:
        """What the table and the predictor give within the limits; None without a student that
        anything is known of."""
        if not table.judged:
            self.notes.append("No single choice was judged in time: all are taken to harm alike")
        if not table.students:
            return None
        space = self.ready.space
        batch = BatchPredictor(self.ready.prepared, space, predictor)
        sized = limits.size_bytes is not None or limits.compressed_bytes is not None
        sizes = Sizes(self.ready.prepared, space, limits) if sized else None
        return WarmStart(space, table, batch, limits, sizes)

    def _seconds(self, share: float, otherwise: float) -> float:
        budget = self.ready.spec.search.time_budget
        return otherwise if budget is None else share * max(0.0, budget - self.spent_s)


def _loaded(path: Path, wanted: DeviceProfile) -> DeviceProfile | None:
    """The profile at ``path``, if there is one and it is what is wanted."""
    try:
        found = DeviceProfile.load(path)
        check_profile(found, wanted)
    except BadInput:
        return None
    return found
