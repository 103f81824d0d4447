"""What a search finds out before its first trial, so that its trials are worth their training: a
device profile, the sensitivity table, and the policies that these two give."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from ..kernels import DeviceProfile, LatencyPredictor
from ..kernels.predictor import enough
from ..spaces import BadInput, FlyweightError
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
from .storage import write_whole
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
    place: where networks are timed."""

    ready: Ready
    place: Place
    run_dir: Path
    console: Console | None
    notes: list[str] = field(default_factory=list)

    def profile(self) -> DeviceProfile | None:
        """The device profile of the place, gone on with from the cache; None if none can be made.
        It lies in the run directory, and in the cache for the next search of the same space."""
        ready, path = self.ready, self.run_dir / PROFILE
        wanted = empty_profile(ready.spec, ready.prepared, self.place.device)
        request = {name: list(shape) for name, shape in wanted.request.items()}
        name = key_of(wanted.fingerprint, request, wanted.network, repr(ready.space.settings))
        kept = cache_folder(ready.spec) / f"profile-{name}.jsonl"
        torch.set_num_threads(1)  # what builds the networks must not spin while they are timed
        try:
            ours = kept.exists()  # else what is known is of another space: its intervals decide
            known = self._known(path, kept, wanted)
            more = min(MOST, FOR_EACH * ready.spec.search.trials)
            networks = more if ours else min(2 * MOST, known + more)
            with counting("Timing networks for the device profile", networks, self.console) as bar:
                make_profile(
                    ready, path, place=self.place, networks=networks,
                    seconds=self._seconds(PROFILE_SHARE, PROFILE_S), seed=0,
                    say=lambda _: None, count=bar,
                )  # fmt: skip
        except (FlyweightError, OSError) as error:
            self.notes.append(f"The device profile is not complete: {error}")
        finally:  # also when it was interrupted
            _keep(path, kept)
        return self.made()

    def made(self) -> DeviceProfile | None:
        """The profile of the place that the run has; None if it is none that could be used."""
        wanted = empty_profile(self.ready.spec, self.ready.prepared, self.place.device)
        try:
            found = DeviceProfile.load(self.run_dir / PROFILE)
            check_profile(found, wanted)
            enough(found)
        except BadInput as error:
            self.notes.append(f"No device profile: {error}. Each policy is timed instead.")
            return None
        return found

    def _known(self, path: Path, kept: Path, wanted: DeviceProfile) -> int:
        """How many networks ``path`` holds, taken from ``kept`` if need be. One of another device
        is put aside. Raises BadInput, OSError."""
        if path.exists():
            found = DeviceProfile.load(path)
            if found.fingerprint == wanted.fingerprint:
                return len(found.timed)
            path.replace(path.with_stem(f"{path.stem}-{found.fingerprint}"))
        earlier = _earlier(kept, wanted)
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
        return otherwise if budget is None else share * budget


def _earlier(path: Path, wanted: DeviceProfile) -> DeviceProfile | None:
    """The profile that an earlier search left, if it is what is wanted."""
    try:
        found = DeviceProfile.load(path)
        check_profile(found, wanted)
    except BadInput:
        return None
    return found


def _keep(path: Path, kept: Path) -> None:
    """Copies the profile at ``path`` to the cache, if it is larger than the one there. Losing it
    costs the next search time and nothing else."""
    try:
        if path.exists() and (not kept.exists() or path.stat().st_size > kept.stat().st_size):
            write_whole(kept, path.read_bytes())
    except OSError:
        return
