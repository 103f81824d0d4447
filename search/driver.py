"""A whole search: prepare, run trials, measure the finalists, write what came of it."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from ..compressors import RUNGS
from ..kernels import DeviceProfile, LatencyPredictor, Timed, Timing, disturbed, signature
from ..spaces import BadInput, FlyweightError
from .cache import key_of
from .controller import Budget, Controller, failures
from .explain import explanation
from .explained import EXPLANATION
from .limits import Limits
from .local_ray import connected, terminable
from .opening import asks_anew, changed_target, is_done, open_run, opening_entry, unmake
from .predict import given_profile, predictor_of
from .preparation import Preparation, worth_preparing
from .pricing import Pricing, predicted, timed
from .profiling import check_profile, empty_profile
from .progress import Progress
from .ready import (
    Ready,
    check_reachable,
    facts_of,
    ready,
    score,
    teacher_answers,
)
from .record import FileRecord
from .report import FILES as REPORT
from .report import write_report
from .results import finalists, measured_front, result
from .spec import Spec
from .store import (
    PROFILE,
    read_artifact,
    remove_checkpoints,
    write_json,
    write_whole,
)
from .strategies import source
from .tracking import MemoryTracker, Status, Tracker
from .tracking_process import TrackerProcess
from .tuning import run_trials
from .warm import WarmStart
from .workers import CompressionTrial, Job, start_meter


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
    console: Any = None,
) -> Outcome:
    """Runs the search that ``spec`` describes. Raises BadInput before anything is spent."""
    began = time.time()
    profile = given_profile(spec)
    fresh = out is None or not out.is_dir() or not any(out.iterdir())
    run_dir = open_run(spec, out, resume)
    record = FileRecord(run_dir / "record.jsonl")
    try:
        say = console.print if console else print
        say(f"Checking {spec.given_task} and tracing its model")
        prepared = ready(spec, run_dir)
        if profile is not None:
            check_profile(profile, empty_profile(spec, prepared.prepared), device=False)
        write_whole(run_dir / "spec.yaml", spec.to_yaml().encode())
        say("Starting Ray" if address is None else f"Joining the Ray cluster at {address}")
        with connected(spec, address):
            say("Timing the teacher on the target")
            return _Search(spec, run_dir, record, prepared, console, began, profile).run()
    except BadInput:
        if fresh and not record.entries():
            unmake(run_dir)
        raise
    finally:
        record.close()


class _Search:
    """One run of it all; its methods are the stages, in order."""

    def __init__(
        self,
        spec: Spec,
        run_dir: Path,
        record: FileRecord,
        prepared: Ready,
        console: Any,
        began: float,
        profile: DeviceProfile | None,
    ) -> None:
        self.spec, self.run_dir, self.record, self.ready = spec, run_dir, record, prepared
        self.console, self.began = console, began
        self.notes: list[str] = []
        self.profile = profile
        self.preparation = Preparation(prepared, run_dir, console, self.notes)
        self.predictor: LatencyPredictor | None = None
        self.nothing_left = is_done(record, spec.search.trials)

    def run(self) -> Outcome:
        meter = start_meter(self.ready)
        device, alone = ray.get([meter.fingerprint.remote(), meter.alone.remote()])
        header = opening_entry(self.ready, self.record, device, alone)
        teacher_ms = header["teacher"]["latency_ms"]
        limits = self.ready.limits(teacher_ms)
        price = timed(self.ready.prepared, meter)
        if asks_anew(header, self.record):
            self._check_limits(price, limits)
        self.predictor = self._predictor(device, teacher_ms)
        if self.predictor is not None:
            price = predicted(self.ready.prepared, self.predictor, limits)
        elif changed_target(header, self.record):
            raise BadInput(
                "--resume: the target has changed, and without a device profile of the new one "
                "what is known cannot be priced for it; name one as target.profile (`flyweight "
                "profile` makes it), or begin a new search with another --out"
            )
        header["predicted_by"] = "timing" if self.predictor is None else "profile"
        try:
            self.record.append(header)  # its time is from before the profile, which so counts
            warm = self._warm_start(limits)
            interrupted = False
        except KeyboardInterrupt:  # what is known is measured and reported, as ever
            warm, interrupted = None, True
            if self.record.entries()[-1:] != [json.loads(json.dumps(header))]:
                self.record.append(header)
        torch.set_num_threads(os.cpu_count() or 1)
        answers = {} if interrupted else teacher_answers(self.ready.prepared)
        torch.set_num_threads(1)  # from here on the trials have the cores
        tracker = self._tracker(header)
        controller = self._controller(limits, tracker, price, warm)
        if interrupted:
            controller.interrupted = True
            controller.close()
        else:
            self._trials(controller, header, answers)
        ray.kill(meter)
        self._note_end(controller)
        found = self._measure(controller, header)
        found |= {"mlflow_run_id": tracker.wait_run_id(30.0)}
        write_json(self.run_dir / "result.json", found)
        self._explain(controller, found)
        write_report(self.run_dir)
        self._finish(tracker, controller)
        failed = bool(controller.fatal) or controller.hopeless()
        return Outcome(self.run_dir, found, controller.interrupted, failed, self.notes)

    def _predictor(self, device: str, teacher_ms: float) -> LatencyPredictor | None:
        """The predictor for the target, which may be another node's device, from the given device
        profile or one that is made now; None where each policy is timed instead."""
        prepared = self.ready.prepared
        if self.profile is None and worth_preparing(self.ready):
            if device == prepared.runtime.fingerprint:
                made = self.preparation
                self.profile = made.made() if self.nothing_left else made.profile()
                self._name_profile()
            else:
                self.notes.append(
                    "Each policy is timed on the target: make a device profile there with "
                    "`flyweight profile` and name it as target.profile"
                )
        if self.profile is None:
            return None
        return predictor_of(
            self.spec, prepared, self.profile, fingerprint=device, teacher_ms=teacher_ms
        )

    def _name_profile(self) -> None:
        """Lets the spec of the run name the profile that was made for it."""
        if self.profile is not None:
            path = str(self.run_dir / PROFILE)
            target = self.spec.target.model_copy(update={"profile": path})
            self.spec = self.spec.model_copy(update={"target": target})
            with contextlib.suppress(OSError):  # only `flyweight explain` would have to be told
                write_whole(self.run_dir / "spec.yaml", self.spec.to_yaml().encode())

    def _warm_start(self, limits: Limits) -> WarmStart | None:
        """Where the first policies come from, where it is worth it."""
        if self.predictor is None or not worth_preparing(self.ready) or self.nothing_left:
            return None
        table = self.preparation.table()
        return self.preparation.warm_start(table, self.predictor, limits)

    def _check_limits(self, price: Pricing, limits: Limits) -> None:
        cases: list[dict[str, float]] = []
        for policy in self.ready.smallest() if limits.costs() else ():
            found = price(policy)
            cases.append(vars(found) | {"latency_ms": found.latency_ms[1]})
        check_reachable(self.spec, limits, cases)

    def _tracker(self, header: dict[str, Any]) -> Tracker:
        tracking = self.spec.tracking
        if tracking is None:
            return MemoryTracker()
        folder = self.spec.folder / "mlartifacts" if tracking.uri.startswith("sqlite:") else None
        location = folder.as_uri() if folder else None
        return TrackerProcess(tracking.uri, tracking.experiment, location, header["search_id"])

    def _controller(
        self,
        limits: Limits,
        tracker: Tracker,
        price: Pricing,
        warm: WarmStart | None,
    ) -> Controller:
        search = self.spec.search
        self.progress = Progress(
            self.console, trials=search.trials, budget_s=search.time_budget, clock=time.time
        )

        def listen(entry: dict[str, Any]) -> None:
            # Of trials, MLflow shows results.
            if entry["kind"] not in ("begin", "rejected", "died"):
                tracker.record(entry)
            if entry["kind"] == "end" and entry["reason"] != "interrupted":
                remove_checkpoints(self.run_dir, entry["digest"])
            self.progress.entry(entry)

        for entry in self.record.entries():  # of a resumed search also what came before
            listen(entry)
        proposals = source(
            search.strategy, self.ready.space, search.sampler, search.seed, search.trials,
            warm, self.ready.recipes(),
        )  # fmt: skip
        budget = Budget(search.trials, search.time_budget)
        return Controller(
            proposals, price, limits, self.record, budget, listen=[listen], look_ahead=True,
            reprice=self.predictor is not None,
        )  # fmt: skip

    def _trials(
        self, controller: Controller, header: dict[str, Any], answers: dict[int, Any]
    ) -> None:
        facts = facts_of(self.spec, header["target"]["fingerprint"])
        job = Job(self.spec, self.run_dir, facts, self._inputs(header), answers)
        resources = {"cpu": self.spec.resources.cpus, "gpu": self.spec.resources.gpus}
        self.progress.spent_s = controller.elapsed()
        with self.progress, terminable():
            run_trials(
                controller,
                tune.with_parameters(CompressionTrial, job=job),
                concurrency=self.spec.search.concurrency,
                resources=resources,
                accelerator=self.spec.resources.accelerator,
            )
        if not (controller.interrupted or controller.fatal):
            remove_checkpoints(self.run_dir)

    def _inputs(self, header: dict[str, Any]) -> str:
        """A digest of what candidates depend on besides policy and rung: what has changed since a
        search was cut off must not go on from what it had."""
        inputs = [header[name] for name in ("seed", "data_digest", "versions")]
        return key_of(*inputs, self.ready.teacher, self.spec.rungs.model_dump())

    def _note_end(self, controller: Controller) -> None:
        if controller.fatal:
            self.notes.append(f"The search could not go on: {controller.fatal}")
        if controller.hopeless():
            reasons = "; ".join(f"{n}x {text}" for text, n in failures(self.record.entries()))
            self.notes.append(f"Every trial failed: {reasons}")
        if self.nothing_left:
            self.notes.append(
                f"All {self.spec.search.trials} trials had been had: only the front was made anew; "
                "raise search.trials to search on"
            )
        elif controller.exhausted and len(controller.trials) < self.spec.search.trials:
            self.notes.append(
                f"There were no further policies to try after {len(controller.trials)} trials"
            )
        if controller.exhausted and not controller.trials:
            self.notes.append(
                "No policy was tried: the upper end of every predicted latency is over the limit. "
                "Ask for less, or let `flyweight profile` make a device profile of more networks"
            )
        if late := controller.late():
            self.notes.append(
                f"The trials in progress took {late:.0f} s longer than the time budget: it is "
                "short for a trial of this task"
            )

    def _measure(self, controller: Controller, header: dict[str, Any]) -> dict[str, Any]:
        """Finalists, alone, in a process of its own; the front and result.json's content."""
        entries = finalists(controller.results(RUNGS[-1]), controller.limits)
        models = {}
        for entry in entries:
            try:
                models[entry["digest"]] = read_artifact(self.run_dir, entry["digest"])
            except FlyweightError as error:
                self.notes.append(str(error))
        entries = [e for e in entries if e["digest"] in models]
        self.progress.note(f"Measuring {len(models)} finalists, alone")
        meter = start_meter(self.ready)
        timings: dict[str, Timing] = ray.get(
            meter.finalists.remote(models, header["teacher"]["latency_ms"])
        )
        ray.kill(meter)
        teacher = dict(header["teacher"]) | {"latency_ms": timings["teacher"].median_ms}
        prepared, test = self.ready.prepared, self.ready.prepared.splits.test
        tests = {
            digest: None if test is None else score(prepared, model, test)
            for digest, model in models.items()
        }
        for digest in models:
            self._append(
                {
                    "kind": "measured",
                    "digest": digest,
                    "latency_ms": timings[digest].median_ms,
                    "latency_spread": timings[digest].spread,
                    "teacher_latency_ms": timings["teacher"].median_ms,
                    "time": time.time(),
                }
            )
        self._feed_back(controller, timings)
        counts = Counter(rung for t in controller.trials.values() for rung in t.results)
        rows = measured_front(entries, timings, tests, header["teacher"]["latency_ms"])
        return result(header, counts, rows, teacher, time.time() - self.began, None)

    def _feed_back(self, controller: Controller, timings: Mapping[str, Timing]) -> None:
        """Adds the finalists to the device profile, which they make better where it matters."""
        if self.profile is None or self.spec.target.profile is None or disturbed(timings):
            return
        path = Path(self.spec.target.profile)
        try:
            profile = DeviceProfile.load(path)  # another search may have added to it
            known = {t.policy for t in profile.timed}
            session = 1 + max((t.session for t in profile.timed), default=-1)
            for trial in controller.trials.values():
                digest = trial.policy.digest
                if digest in timings and digest not in known:
                    counts = signature(self.ready.prepared.plan(trial.policy))
                    took, teacher = timings[digest].median_ms, timings["teacher"].median_ms
                    profile.timed.append(Timed(counts, took, teacher, session, digest))
            profile.create(path)
        except (BadInput, OSError) as error:
            self.notes.append(f"the finalists were not added to the device profile: {error}")

    def _explain(self, controller: Controller, found: Mapping[str, Any]) -> None:
        """Why the best takes its time, for the report, on the machine as fast as it is now."""
        digest = found["best"] or found["nearest_miss"]
        (self.run_dir / EXPLANATION).unlink(missing_ok=True)  # of an earlier session
        if self.predictor is None or digest is None:
            return
        policies = (trial.policy for trial in controller.trials.values())
        policy = next(policy for policy in policies if policy.digest == digest)
        predictor = self.predictor.beside(found["teacher"]["latency_ms"])
        try:
            why = explanation(self.ready.prepared, self.ready.space, predictor, policy)
            write_json(self.run_dir / EXPLANATION, why)
        except (FlyweightError, OSError) as error:
            self.notes.append(f"the report does not say where the time goes: {error}")

    def _append(self, entry: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk was told already; result.json will tell
            self.record.append(entry)

    def _finish(self, tracker: Tracker, controller: Controller) -> None:
        for entry in self.record.entries():
            if entry["kind"] == "measured":
                tracker.record(entry)
        status: Status = (
            "KILLED" if controller.interrupted else "FAILED" if controller.fatal else "FINISHED"
        )
        files = [self.run_dir / name for name in ("result.json", "spec.yaml", *REPORT)]
        missing = tracker.finish(status, files)
        if missing.reason:
            self.notes.append(
                f"MLflow lacks {missing.entries} entries ({missing.reason}); the record has them "
                "all: run the search again with --resume when the server is back"
            )
