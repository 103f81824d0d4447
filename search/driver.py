"""A whole search: prepare, run trials, measure the finalists, write what came of it."""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compressors.answering import torch_threads
from ..kernels import DeviceProfile, LatencyPredictor
from ..kernels.cores import cores
from ..spaces import BadInput
from .cache import key_of
from .conclusion import Conclusion
from .controller import Budget, Controller
from .counting import telling
from .ending import fruitless, notes_of_end
from .limits import Limits, limits_of
from .local_ray import check_no_ray, connected, ctrl_c_given_back, terminable
from .opening import (
    Kept,
    asks_anew,
    changed_limits,
    changed_target,
    check_same,
    class_of,
    is_done,
    kept,
    known_sizes,
    lasting,
    opening_entry,
    priced_alike,
    target_before,
)
from .placement import Place, place_of, trial_request
from .predict import given_profile, predictor_of
from .preflight import check_cluster
from .preparation import Preparation, worth_preparing
from .pricing import Pricing, predicted, timed
from .profiling import check_device, check_profile, empty_profile
from .progress import Progress
from .reach import check_fastest, check_limits, check_without_ray
from .ready import (
    Ready,
    facts_of,
    ready,
    teacher_answers,
    trained_in_bfloat16,
)
from .record import NOT_FOR_GOOD, Entry, Record, at_work
from .report import FILES as REPORT
from .run_files import PROFILE, RESULT, SPEC
from .spec import Spec
from .storage import write_whole
from .store import (
    remove_checkpoints,
)
from .strategies import source
from .tracking import TRACKED, MemoryTracker, Status, Tracker, tracked_at
from .tracking_process import TrackerProcess
from .trial import Trial
from .tuning import run_trials
from .warm import WarmStart
from .workers import KEPT, Job, trainable

CPU_ALONE = (
    "trials ask for GPUs, but a worker trains on its CPU: torch sees no GPU there (its driver is "
    "too old, or torch a build for CPUs alone)"
)
FINISH_S, AWAY_S = 30.0, 5.0  # for MLflow at the end: one that has answered, one that never did


@dataclass(frozen=True)
class Outcome:
    """result: the content of result.json. interrupted: ended by Ctrl-C. notes: what went wrong."""

    run_dir: Path
    result: dict[str, Any]
    interrupted: bool
    failed: bool
    notes: list[str]


def search(
    spec: Spec,
    out: Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    wait_s: float = 0.0,
    console: Any = None,
) -> Outcome:
    """Runs the search that ``spec`` describes. Raises BadInput before anything is spent. wait_s:
    for nodes to come that can run its trials, and that measure, where the cluster has none."""
    began = time.time()
    check_no_ray()  # before anything is spent
    profile = given_profile(spec)
    with terminable(), kept(spec, out, resume) as run:
        say, local = console.print if console else print, address is None
        check_same(run.record, task_class=class_of(spec))
        with telling(f"Checking {spec.given_task} and tracing its model", console):
            prepared = _checked(spec, run.record, profile, local)
            prepared.write(run.run_dir)
        for note in (prepared.doubt, prepared.too_fine, changed_limits(spec, run.record)):
            if note:
                say(f"Note: {note}")
        text = "Starting Ray" if local else f"Joining the Ray cluster at {address}"
        with contextlib.ExitStack() as joined:
            with telling(text, console):
                joined.enter_context(connected(spec, address))
            check_cluster(prepared, run.storage, local, wait_s, say)
            before = target_before(run.record)
            place = place_of(prepared, profile, local, say, wait_s, before)
            whole = _Search(run, prepared, place, profile, began, console, local)
            with contextlib.closing(whole):
                return whole.run()


def _checked(spec: Spec, record: Record, profile: DeviceProfile | None, local: bool) -> Ready:
    """All that can be refused without Ray, which takes seconds to start, is refused here."""
    found = ready(spec)
    check_same(record, **lasting(found))
    if profile is not None:
        check_profile(profile, empty_profile(spec, found.prepared), device=False)
        check_device(profile, found, local)
    if asks_anew(spec, record):
        check_without_ray(found, local)
    return found


class _Search:
    """One run of it all; its methods are the stages, in order."""

    def __init__(
        self,
        run: Kept,
        prepared: Ready,
        place: Place,
        profile: DeviceProfile | None,
        began: float,
        console: Any,
        local: bool,
    ) -> None:
        self.local = local
        self.spec, self.ready, self.place = prepared.spec, prepared, place
        self.run_dir, self.record = run.run_dir, run.record
        self.storage, self.mirror = run.storage, run.mirror
        self.console, self.began = console, began
        entries = run.record.entries()
        self.earlier_s = _worked(entries)
        self.notes: list[str] = []
        self.janitor = ThreadPoolExecutor(1, "flyweight-janitor")  # a storage may be slow
        self.waiting: dict[int, str] = {}  # trials that may go on from a checkpoint: their digests
        self.profile = profile
        self.spent_s = next(reversed(at_work(entries)), 0.0)
        self.preparation = Preparation(
            prepared, place, run.run_dir, console, self.notes, self.spent_s
        )
        self.predictor: LatencyPredictor | None = None
        wanted = self.spec.search
        self.nothing_left = is_done(run.record, wanted.trials, wanted.time_budget)

    def run(self) -> Outcome:
        with telling("Timing the teacher on the target", self.console):
            self.alone_ms = self.place.alone()
        halves = self._bfloat16()
        header = opening_entry(self.ready, self.record, self.place.device, self.alone_ms, halves)
        teacher_ms = header["teacher"]["latency_ms"]
        limits = limits_of(header)
        price = timed(self.ready.prepared, self.place, teacher_ms / self.alone_ms)
        new_limits = asks_anew(self.spec, self.record)
        if new_limits and not self.local and self.place.there:
            check_limits(self.ready, limits, price)
        self.predictor = self._predictor(teacher_ms)
        header["predicted_by"] = "timing" if self.predictor is None else "profile"
        if self.predictor is not None:
            sizes = known_sizes(header, self.record)
            price = predicted(self.ready.prepared, self.predictor, limits, sizes)
            if new_limits and not self.local and not self.place.there:
                check_limits(self.ready, limits, price)
        elif changed_target(header, self.record):
            raise BadInput(
                "--resume: the target has changed, and without a device profile of the new one "
                "what is known cannot be priced for it; name one as target.profile (`flyweight "
                "profile` makes it), or begin a new search with another --out"
            )
        if self.predictor is not None and self.spec.target.profile is not None:
            header["profile"] = key_of(Path(self.spec.target.profile).read_bytes())
        reprice = self.predictor is not None and not priced_alike(header, self.record)
        try:
            self.record.append(header)  # its time is from before the profile, which so counts
            warm = self._warm_start(limits)
            # What results there are is judged anew by limits that were asked for before.
            asked = new_limits or not any(e["kind"] == "result" for e in self.record.entries())
            fastest_ms = warm.fastest_ms() if warm and asked else None
            if fastest_ms:
                check_fastest(self.ready, limits, fastest_ms, teacher_ms)
            interrupted = False
        except KeyboardInterrupt:  # what is known is measured and reported, as ever
            warm, interrupted = None, True
            if self.record.entries()[-1:] != [json.loads(json.dumps(header))]:
                self.record.append(header)
        answers = {} if interrupted or self.nothing_left else self._answers()
        tracker = self._tracker(header)
        controller = self._controller(limits, tracker, price, warm, reprice)
        if interrupted:
            controller.interrupted = True
            controller.close()
        else:
            self._trials(controller, header, answers)
        self.place.close()
        if isinstance(controller.fatal, BadInput):
            self._finish(tracker, controller)
            raise controller.fatal
        self.notes += notes_of_end(controller, self.nothing_left)
        if warm and (note := warm.note()):
            self.notes.append(note)
        conclusion = self._conclusion()
        found = conclusion.measure(controller, header)
        found |= {"mlflow_run_id": tracker.wait_run_id(FINISH_S)}
        written = conclusion.write(controller, found)
        self._finish(tracker, controller)
        empty = not (found["front"] or controller.interrupted)
        failed = bool(controller.fatal or fruitless(controller)) or empty or not written
        return Outcome(self.run_dir, found, controller.interrupted, failed, self.notes)

    def _bfloat16(self) -> list[str]:
        """The students that train so: as it was decided when the search began, on such devices."""
        spec = self.spec
        for session in self.record.entries():
            if session["kind"] == "search" and session.get("gpus") == (spec.resources.gpus > 0):
                known: list[str] = session["bfloat16"]
                return known
        return trained_in_bfloat16(spec, self.ready.prepared, spec.space.distill.students)

    def _answers(self) -> dict[int, Any]:
        torch.set_num_threads(1)  # but for this the trials have the cores
        with telling("The teacher answers the training data", self.console), torch_threads(cores()):
            return teacher_answers(self.ready.prepared)

    def close(self) -> None:
        """Ends its thread, also where the search was cut short."""
        self.janitor.shutdown(cancel_futures=True)

    def _predictor(self, teacher_ms: float) -> LatencyPredictor | None:
        """The predictor for the device that is measured on, from the given device profile or one
        that is made now; None where each policy is timed instead."""
        if self.profile is None:
            self.profile = self.preparation.found(teacher_ms, self.nothing_left)
            self._name_profile()
        if self.profile is None:
            return None
        fingerprint = self.place.device.fingerprint
        return predictor_of(
            self.spec, self.ready.prepared, self.profile, fingerprint=fingerprint,
            teacher_ms=teacher_ms,
        )  # fmt: skip

    def _name_profile(self) -> None:
        """Lets the spec of the run name the profile that was made for it."""
        if self.profile is not None:
            path = str(self.run_dir / PROFILE)
            target = self.spec.target.model_copy(update={"profile": path})
            self.spec = self.spec.model_copy(update={"target": target})
            with contextlib.suppress(OSError):  # only `flyweight explain` would have to be told
                write_whole(self.run_dir / SPEC, self.spec.to_yaml().encode())

    def _warm_start(self, limits: Limits) -> WarmStart | None:
        """Where the first policies come from, where it is worth it."""
        if self.predictor is None or not worth_preparing(self.ready) or self.nothing_left:
            return None
        table = self.preparation.table()
        return self.preparation.warm_start(table, self.predictor, limits)

    def _tracker(self, header: dict[str, Any]) -> Tracker:
        tracking = self.spec.tracking
        if tracking is None:
            return MemoryTracker()
        return TrackerProcess(*tracked_at(tracking, header), self.run_dir)

    def _controller(
        self,
        limits: Limits,
        tracker: Tracker,
        price: Pricing,
        warm: WarmStart | None,
        reprice: bool,
    ) -> Controller:
        search = self.spec.search
        self.progress = Progress(
            self.console, trials=search.trials, budget_s=search.time_budget, clock=time.time
        )

        def listen(entry: dict[str, Any]) -> None:
            if entry["kind"] in TRACKED:
                tracker.record(entry)
            self.progress.entry(entry)

        def look(entry: dict[str, Any]) -> None:
            alone = entry.get("device") == "cpu" and self.spec.resources.gpus
            if alone and CPU_ALONE not in self.notes:
                self.notes.append(CPU_ALONE)
                (self.console.print if self.console else print)(f"Note: {CPU_ALONE}")

        for entry in self.record.entries():  # of a resumed search also what came before
            listen(entry)
        left_s = max(0.0, (search.time_budget or math.inf) - self.spent_s)
        with telling("Choosing the first policies", self.console):
            proposals = source(
                search.strategy, self.ready.space, search.sampler, search.seed, search.trials,
                warm, self.ready.recipes(), left_s,
            )  # fmt: skip
        short = self.spec.rungs.short
        budget = Budget(search.trials, search.time_budget, longer=1 / short - 1)
        self.controller = Controller(
            proposals, price, limits, self.record, budget, listen=[listen, look, self._tidy],
            look_ahead=True, reprice=reprice, front_alone=self.nothing_left,
        )  # fmt: skip
        self.waiting = _waiting(self.controller)
        return self.controller

    def _tidy(self, entry: dict[str, Any]) -> None:
        """Removes the checkpoints of trials that ended for good, or are unlikely to go on."""
        gone: list[str] = []
        if entry["kind"] == "result" and entry["rung"] in KEPT:
            passed = self.waiting.keys() - self.controller.waiting()  # others may be ahead now
            gone = [self.waiting.pop(number) for number in passed]
        elif entry["kind"] == "again":
            self.waiting.pop(entry["trial"], None)
        elif entry["kind"] != "end" or entry["reason"] in NOT_FOR_GOOD:
            return
        elif entry["reason"] == "stopped" and not _left(self.controller.trials[entry["trial"]]):
            return  # if it goes on it has its first, perhaps before a slow storage removes any
        elif entry.get("ahead"):
            self.waiting[entry["trial"]] = entry["digest"]
        else:
            gone = [entry["digest"]]
        for digest in gone:
            self.janitor.submit(remove_checkpoints, self.storage, digest)

    def _trials(
        self, controller: Controller, header: dict[str, Any], answers: dict[int, Any]
    ) -> None:
        facts = facts_of(self.spec, header["target"]["fingerprint"])
        inputs = self._inputs(header)
        job = Job(
            self.spec, self.storage, facts, inputs, answers, self.ready.made, header["bfloat16"]
        )
        self.progress.spent_s = controller.elapsed()
        with self.progress, ctrl_c_given_back():
            run_trials(
                controller,
                trainable(job),
                concurrency=self.spec.search.concurrency,
                resources=trial_request(self.spec.resources),
                interrupted=self.progress.interrupt,
            )
        self.janitor.shutdown()
        waits = any(trial.ended in NOT_FOR_GOOD for trial in controller.trials.values())
        if not (waits or controller.fatal):
            remove_checkpoints(self.storage)

    def _inputs(self, header: dict[str, Any]) -> str:
        """A digest of what candidates depend on besides policy and rung: what has changed since a
        search was cut off must not go on from what it had."""
        inputs = [header[name] for name in ("seed", "data_digest", "versions", "rungs", "bfloat16")]
        return key_of(*inputs, self.ready.teacher)

    def _conclusion(self) -> Conclusion:
        own = self.spec.target.profile
        return Conclusion(
            self.ready, self.place, self.run_dir, self.record, self.storage, self.console,
            self.notes, self.alone_ms, self.began - self.earlier_s, bool(self.mirror),
            self.predictor, self.profile, Path(own) if own else None, self.preparation.keep,
        )  # fmt: skip

    def _finish(self, tracker: Tracker, controller: Controller) -> None:
        if self.mirror:
            self.mirror.close()
            if self.mirror.failed:
                self.notes.append(f"storage: the record was not copied: {self.mirror.failed}")
        for entry in self.record.entries():
            if entry["kind"] == "measured":
                tracker.record(entry)
        status: Status = (
            "KILLED" if controller.interrupted else "FAILED" if controller.fatal else "FINISHED"
        )
        files = [self.run_dir / name for name in (RESULT, SPEC, *REPORT)]
        # One that never answered is given little time: nobody wants to wait for what is not there.
        patience = FINISH_S if tracker.run_id else AWAY_S
        missing = tracker.finish(status, [file for file in files if file.is_file()], patience)
        if missing.reason:
            lacks = f"up to {missing.entries} entries" if missing.entries else "files or the end"
            self.notes.append(
                f"MLflow lacks {lacks} ({missing.reason}); the run has all: "
                f"`flyweight deliver {self.run_dir}` when the server is back"
            )


def _left(trial: Trial) -> bool:
    """Whether ``trial`` left a checkpoint."""
    return not trial.results.keys().isdisjoint(KEPT)


def _waiting(controller: Controller) -> dict[int, str]:
    """By trial the digest of each policy that stopped where it may go on from a checkpoint."""
    may = (controller.trials[number] for number in controller.waiting())
    return {trial.number: trial.policy.digest for trial in may if _left(trial)}


def _worked(entries: Sequence[Entry]) -> float:
    """Seconds that the sessions of ``entries`` took, of one that was killed only those at work."""
    said = (e.get("wall_s", 0.0) for e in reversed(entries) if e["kind"] == "done")
    return max(next(said, 0.0), next(reversed(at_work(entries)), 0.0))
