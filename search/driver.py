"""A whole search: prepare, run trials, measure the finalists, write what came of it."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from ..compressors import RUNGS
from ..kernels import DeviceProfile, LatencyPredictor, Timed, Timing, disturbed, signature
from ..spaces import BadInput, FlyweightError, Policy
from .cache import key_of
from .controller import Budget, Controller, failures
from .explain import explanation
from .explained import EXPLANATION
from .limits import Limits
from .predict import given_profile, predictor_of
from .preparation import PROFILE, Preparation, worth_preparing
from .pricing import Pricing, predicted, timed
from .profiling import check_profile, empty_profile, plan_of
from .progress import Progress
from .ready import (
    Ready,
    check_reachable,
    data_digest,
    facts_of,
    ready,
    score,
    teacher_answers,
    versions,
)
from .record import FileRecord
from .report import write_report
from .results import finalists, measured_front, result
from .spec import Spec, load_spec
from .store import (
    compressed_bytes,
    read_artifact,
    remove_checkpoints,
    write_json,
    write_whole,
)
from .strategies import source
from .tracking import MemoryTracker, Status, Tracker
from .tracking_process import TrackerProcess
from .tuning import run_trials
from .workers import CompressionTrial, Job, start_meter

FREE_BYTES = 200_000_000  # what a run directory may come to need


@dataclass(frozen=True)
class Outcome:
    """result: the content of result.json. interrupted: ended by Ctrl-C. notes: what went wrong."""

    run_dir: Path
    result: dict[str, Any]
    interrupted: bool
    failed: bool
    notes: list[str]


def search(
    spec_path: Path,
    out: Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    console: Any = None,
) -> Outcome:
    """Runs the search that ``spec_path`` describes. Raises BadInput before anything is spent."""
    began = time.time()
    spec = load_spec(spec_path)
    profile = given_profile(spec)
    run_dir = open_run(spec, out, resume)
    record = FileRecord(run_dir / "record.jsonl")
    try:
        say = console.print if console else print
        say(f"Checking {spec.given_task} and tracing its model")
        prepared = ready(spec, run_dir)
        if profile is not None:
            check_profile(profile, empty_profile(spec, prepared.prepared), device=False)
        write_whole(run_dir / "spec.yaml", spec.to_yaml().encode())
        with _ray(spec, address):
            return _Search(spec, run_dir, record, prepared, console, began, profile).run()
    finally:
        record.close()


def open_run(spec: Spec, out: Path | None, resume: bool) -> Path:
    """The run directory, made if need be. Raises BadInput when it is not what was asked for."""
    name = spec.task.rpartition(":")[2]
    if out is None:
        earlier = sorted(Path("runs").glob(f"{name}-*/record.jsonl"))
        if resume and not earlier:
            raise BadInput(f"nothing to resume: no runs/{name}-*; say which with --out")
        out = (
            earlier[-1].parent if resume else Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
        )
    out = out.resolve()
    kept = out / "record.jsonl"
    exists = kept.is_file() and kept.stat().st_size > 0
    if resume and not exists:
        raise BadInput(f"nothing to resume in {out}: it has no record.jsonl")
    if exists and not resume:
        raise BadInput(f"{out} holds a search already; go on with --resume or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise BadInput(f"the run directory {out} cannot be made: {error}") from error
    if free < FREE_BYTES:
        raise BadInput(
            f"{out} has {free / 1e6:.0f} MB free; a search needs {FREE_BYTES / 1e6:.0f} MB: "
            "free some, or choose another --out"
        )
    return out


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

    def run(self) -> Outcome:
        meter = start_meter(self.ready)
        header = self._header(ray.get(meter.alone.remote()))
        teacher_ms = header["teacher"]["latency_ms"]
        limits = self.ready.limits(teacher_ms)
        price = timed(self.ready.prepared, meter)
        if self._asks_anew(header):
            self._check_limits(price, limits)
        self.predictor = self._predictor(meter, teacher_ms)
        if self.predictor is not None:
            price = predicted(self.ready.prepared, self.predictor, limits)
        header["predicted_by"] = "timing" if self.predictor is None else "profile"
        self.record.append(header)  # its time is from before the profile, which so counts
        solved = self._solved(limits)
        torch.set_num_threads(os.cpu_count() or 1)
        self.answers = teacher_answers(self.ready.prepared)
        torch.set_num_threads(1)  # from here on the trials have the cores
        tracker = self._tracker(header)
        controller = self._controller(limits, tracker, price, solved)
        self._trials(controller, header)
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

    def _header(self, latency_ms: float) -> dict[str, Any]:
        """The entry that begins each session of a search. A resumed one keeps the teacher's
        figures, so that its limits stay what they were."""
        spec, earlier = self.spec, self.record.entries()
        runtime, network = self.ready.prepared.runtime, self.ready.prepared.network
        teacher = {
            "metric": self.ready.metric,
            "metric_test": self.ready.metric_test,
            "latency_ms": latency_ms,
            "size_bytes": len(self.ready.teacher),
            "compressed_bytes": compressed_bytes(self.ready.teacher),
        }
        header = {
            "kind": "search",
            "flyweight": version("flyweight"),
            **facts_of(spec, runtime.fingerprint),
            "resolved_task": spec.task,
            "objective": spec.objective.model_dump(),
            "teacher": teacher,
            "versions": versions(spec.target.runtime),
            "data_digest": data_digest(self.ready.prepared),
            "capabilities": key_of(repr(runtime.capabilities)),
            "groups": {name: group.width for name, group in network.groups.items()},
            "blocks": {name: list(block.groups) for name, block in network.blocks.items()},
            "layers": len(network.layers),
            "search_id": earlier[0]["search_id"] if earlier else secrets.token_hex(8),
            "time": time.time(),
        }
        if earlier:
            if "resolved_task" not in earlier[0]:
                raise BadInput(
                    "--resume: an earlier flyweight wrote this record; begin a new search"
                )
            for key in ("resolved_task", "data_digest", "capabilities"):
                if earlier[0].get(key) != header[key]:
                    raise BadInput(
                        f"--resume: {key} is {header[key]}, but the search began with "
                        f"{earlier[0][key]}; begin a new search with another --out"
                    )
            if earlier[0]["target"] == header["target"]:
                header["teacher"] = earlier[0]["teacher"]
            header["task"] = earlier[0]["task"]  # RUN_DIR/spec.yaml says it by its path
        return header

    def _predictor(self, meter: Any, teacher_ms: float) -> LatencyPredictor | None:
        """The predictor for the target, from the given device profile or one that is made now;
        None where each policy is timed instead."""
        prepared = self.ready.prepared
        device = ray.get(meter.fingerprint.remote())  # the target's, which may be another node
        if self.profile is None and worth_preparing(self.ready):
            if device == prepared.runtime.fingerprint:
                self.profile = self.preparation.profile()
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
            write_whole(self.run_dir / "spec.yaml", self.spec.to_yaml().encode())

    def _solved(self, limits: Limits) -> list[Policy]:
        """The policies of the warm start, where there is one."""
        if self.predictor is None or not worth_preparing(self.ready):
            return []
        return self.preparation.first(self.preparation.table(), self.predictor, limits)

    def _asks_anew(self, header: dict[str, Any]) -> bool:
        """Whether the limits are other than those that the record's last session began with."""
        earlier = [e["objective"] for e in self.record.entries() if e["kind"] == "search"]
        return not earlier or earlier[-1] != header["objective"]

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
        solved: Sequence[Policy],
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
            solved, self.ready.recipes(),
        )  # fmt: skip
        budget = Budget(search.trials, search.time_budget)
        return Controller(
            proposals, price, limits, self.record, budget, listen=[listen], look_ahead=True,
            reprice=self.predictor is not None,
        )  # fmt: skip

    def _trials(self, controller: Controller, header: dict[str, Any]) -> None:
        facts = facts_of(self.spec, self.ready.prepared.runtime.fingerprint)
        job = Job(self.spec, self.run_dir, facts, self._inputs(header), self.answers)
        resources = {"cpu": self.spec.resources.cpus, "gpu": self.spec.resources.gpus}
        with self.progress, _terminable():
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
        inputs = {name: header[name] for name in ("seed", "data_digest", "versions")}
        inputs["teacher"] = hashlib.sha256(self.ready.teacher).hexdigest()
        inputs["rungs"] = self.spec.rungs.model_dump()
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

    def _note_end(self, controller: Controller) -> None:
        if controller.fatal:
            self.notes.append(f"The search could not go on: {controller.fatal}")
        if controller.hopeless():
            reasons = "; ".join(f"{n}x {text}" for text, n in failures(self.record.entries()))
            self.notes.append(f"Every trial failed: {reasons}")
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
                    counts = signature(plan_of(self.ready.prepared, trial.policy))
                    took, teacher = timings[digest].median_ms, timings["teacher"].median_ms
                    profile.timed.append(Timed(counts, took, teacher, session, digest))
            profile.create(path)
        except (BadInput, OSError) as error:
            self.notes.append(f"the finalists were not added to the device profile: {error}")

    def _explain(self, controller: Controller, found: Mapping[str, Any]) -> None:
        """Why the best takes its time, for the report, on the machine as fast as it is now."""
        digest = found["best"] or found["nearest_miss"]
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
        files = [self.run_dir / name for name in ("result.json", "report.html", "spec.yaml")]
        missing = tracker.finish(status, files)
        if missing.reason:
            self.notes.append(
                f"MLflow lacks {missing.entries} entries ({missing.reason}); the record has them "
                "all: run the search again with --resume when the server is back"
            )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM (a job that is stopped) ends a search as Ctrl-C does: with the best so far."""
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ray(spec: Spec, address: str | None) -> Iterator[None]:
    """Ray, local unless an address is given, protected by a token in either case."""
    if address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    needed = int(spec.search.concurrency * spec.resources.cpus + 0.999)
    local: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, needed),
        "include_dashboard": False,
    }
    here = Path.cwd()
    scratch = Path(os.environ.get("TMPDIR", "/tmp"))
    os.chdir(scratch)  # Ray puts the driver's folder on every worker's path
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else local),
        )
        yield
    except ConnectionError as error:
        raise BadInput(f"no Ray cluster at {address}: {error}") from error
    finally:
        ray.shutdown()
        os.chdir(here)
