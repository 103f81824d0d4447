"""The end of a search whose trials have ended: its finalists, measured, result.json and report."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compressors import RUNGS
from ..kernels import DeviceProfile, LatencyPredictor, Timed, Timing, signature
from ..spaces import BadInput, FlyweightError, Impossible
from .controller import Controller
from .counting import telling
from .explain import explanation
from .meter import noise, noisy
from .placement import Place, of_finalists
from .profiling import writing
from .ready import Ready, tested
from .record import Entry, Record
from .report import write_report
from .results import final_front, finalists, measured_entry, result
from .run_files import EXPLANATION, PROFILE, RESULT
from .storage import Storage
from .store import fetch_artifact, read_artifact, write_json

FEED_S = 10.0  # that the finalists wait for another search that adds its own to the same profile


@dataclass
class Conclusion:
    """alone_ms: of the teacher on the idle target, before the trials. since: when the search would
    have begun, had its sessions followed one another. fetches: whether artifacts lie in the
    ``storage`` alone. profile, profile_path: the device profile, and where it lies; keep_profile
    lets later searches know of it. notes: gets what went wrong."""

    ready: Ready
    place: Place
    run_dir: Path
    record: Record
    storage: Storage
    console: Any
    notes: list[str]
    alone_ms: float
    since: float
    fetches: bool = False
    predictor: LatencyPredictor | None = None
    profile: DeviceProfile | None = None
    profile_path: Path | None = None
    keep_profile: Callable[[], None] = lambda: None

    def measure(self, controller: Controller, header: Entry) -> dict[str, Any]:
        """Finalists, alone, in a process of its own; the front and result.json's content."""
        entries = finalists(controller.results(RUNGS[-1]), controller.limits)
        digests = [entry["digest"] for entry in entries]
        models: dict[str, bytes] = {}
        tests: dict[str, float | None] = {}
        timings = None
        try:
            if self.fetches:
                with telling("Fetching the artifacts", self.console):
                    self._fetch(controller, set(digests))
            models |= self._models(digests)
            self._test(models, tests)
            timings = self._timings(models)
        except KeyboardInterrupt:  # what is not known by now stays unknown
            controller.interrupted = True
            models = models or self._models(digests)
        if timings is None:
            self.notes.append(
                "The latencies of the front are predicted; on the device that will run the model, "
                f"`flyweight measure {self.run_dir}` measures them"
            )
        left = models if timings is None else timings
        entries = [entry for entry in entries if entry["digest"] in left]
        teacher = dict(header["teacher"])
        if timings is not None:
            teacher |= {"latency_ms": timings["teacher"].median_ms}
            for digest in [entry["digest"] for entry in entries]:
                self._append(measured_entry(digest, timings, self.place.device, tests.get(digest)))
            self._feed_back(controller, timings)
        counts = Counter(rung for t in controller.trials.values() for rung in t.results)
        rows = final_front(header, entries, tests, timings)
        return result(header, counts, rows, teacher, time.time() - self.since, None)

    def _models(self, digests: list[str]) -> dict[str, bytes]:
        """The models of finalists. One that is damaged is left out: it must not cost the end of
        the search, and of each later."""
        models = {}
        for digest in digests:
            try:
                models[digest] = read_artifact(self.run_dir, digest)
            except FlyweightError as error:
                self.notes.append(str(error))
        return models

    def _test(self, models: dict[str, bytes], tests: dict[str, float | None]) -> None:
        """Adds to ``tests`` the metrics of ``models`` on test, one after another; what the runtime
        refuses is taken out of ``models``."""
        wanted = models and self.ready.prepared.splits.test is not None
        text = f"Scoring {len(models)} finalists on test"
        with telling(text, self.console) if wanted else contextlib.nullcontext():
            for digest in list(models):
                try:
                    tests[digest], why = tested(self.ready.prepared, models[digest])
                except Impossible as error:
                    self.notes.append(f"Finalist {digest[:12]} is left out: {error}")
                    del models[digest]
                    continue
                if why and why not in self.notes:
                    self.notes.append(why)

    def _fetch(self, controller: Controller, kept: set[str]) -> None:
        """Brings the artifacts into the run directory, those of finalists first; the storage keeps
        these alone."""
        found = [entry["digest"] for entry in controller.results(RUNGS[-1])]
        for digest in sorted(found, key=lambda digest: digest not in kept):
            try:
                fetch_artifact(self.storage, self.run_dir, digest)
            except OSError as error:
                self.notes.append(f"artifact {digest[:12]} cannot be fetched: {error}")
                continue
            if digest not in kept and not (controller.interrupted or controller.fatal):
                self.storage.remove(f"artifacts/{digest}")

    def _timings(self, models: Mapping[str, bytes]) -> dict[str, Timing] | None:
        """The finalists, alone, but for those that the runtime refuses or dies of; None where they
        could not be measured."""
        timings, text = None, f"Measuring {len(models)} finalists, alone"
        try:
            with telling(text, self.console) if models else contextlib.nullcontext():
                timings = of_finalists(self.place, models, self.alone_ms)
        except (FlyweightError, OSError) as error:
            self.notes.append(f"The finalists could not be measured: {error}")
        if timings is not None and (told := noise(timings, self.place.device.facts, self.run_dir)):
            self.notes.append(told)
        refused = [] if timings is None else [digest for digest in models if digest not in timings]
        self.notes += [
            f"Finalist {digest[:12]} is left out: the target's runtime refuses it, or dies of it"
            for digest in refused
        ]
        return timings

    def _feed_back(self, controller: Controller, timings: Mapping[str, Timing]) -> None:
        """Adds the finalists to the device profile, which they make better where it matters."""
        path = self.profile_path
        if self.profile is None or path is None or noisy(timings, self.place.device.facts):
            return
        try:
            with writing(path, patience_s=FEED_S):
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
            if path == self.run_dir / PROFILE:
                self.keep_profile()
        except (BadInput, OSError) as error:
            self.notes.append(f"the finalists were not added to the device profile: {error}")

    def write(self, controller: Controller, found: dict[str, Any]) -> bool:
        """Whether result.json and the report could be written; each is whole or not there."""
        try:
            write_json(self.run_dir / RESULT, found)
            self._append(
                {"kind": "done", "wall_s": found["wall_s"], "spent_s": controller.spent_s()}
            )  # the report, for one, asks whether the search runs
            self._reported(controller, found)
        except OSError as error:
            self.notes.append(
                f"result.json or the report could not be written: {error}; the record is whole: "
                "make room and go on with --resume"
            )
            return False
        return True

    def _reported(self, controller: Controller, found: Mapping[str, Any]) -> None:
        """Writes the report; what nobody foresaw of it must not cost the end of a search. Raises
        OSError."""
        try:
            self._explain(controller, found)
            write_report(self.run_dir)
        except OSError:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            self.notes.append(f"The report could not be made, result.json is whole: {told}")

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
