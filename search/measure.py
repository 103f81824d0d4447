"""The finalists of a finished run timed on this device, which need not be the one that was searched
for: a run that was fetched from a cluster, or the same model on another machine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..kernels import MeasuringProcess
from ..spaces import BadInput
from .choose import how_to_end, read_result
from .meter import Device, Meter, noise
from .record import Entry, FileRecord, ends
from .report import write_report
from .results import final_front, finalists, full_results, measured_entry, remeasured
from .run_files import EXPLANATION, RECORD, RESULT, TEACHER
from .store import read_artifact, read_request, write_json


@dataclass(frozen=True)
class Measured:
    """result: what result.json holds now. notes: what is to be known of it."""

    result: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def measure(run_dir: Path, say: Callable[[str], None] = print) -> Measured:
    """Times the finalists of ``run_dir`` beside the teacher on this device and writes its
    result.json and report anew: the front, the best and the nearest miss are those of this device.
    The record gets what was measured, and on what.

    Needs nothing but the run directory; nothing is written before all is measured. Raises BadInput
    for a run that has not ended or is in use, or whose runtime is not here; FlyweightError for an
    artifact that is damaged.
    """
    result, place = read_result(run_dir), run_dir / RECORD
    if not place.is_file():
        raise BadInput(f"{run_dir} has no record.jsonl: fetch the whole directory of the run")
    record = FileRecord(place)  # nobody else goes on with it meanwhile
    try:
        entries = record.entries()
        check_ended(run_dir, entries)
        header = next(e for e in reversed(entries) if e["kind"] == "search")
        target = result["target"]
        device = Device.of_this(target["runtime"], target["threads"])
        chosen, notes = finalists(*full_results(header, entries)), []
        present = [e for e in chosen if (run_dir / e["artifact"]).exists()]
        if missing := len(chosen) - len(present):
            notes.append(f"{missing} of {len(chosen)} finalists are not in {run_dir}: left out")
        if not present:
            raise BadInput(f"{run_dir} holds none of its finalists: there is nothing to measure")
        models = {e["digest"]: read_artifact(run_dir, e["digest"]) for e in present}
        teacher = (run_dir / TEACHER).read_bytes()
        start = target["runtime"], target["threads"], teacher, read_request(run_dir)
        say(f"Measuring {len(models)} finalists on this device ({device.fingerprint})")
        meter = Meter(*start)
        with MeasuringProcess(*start) as process:  # this one would die of what the runtime dies of
            borne = process.bears(models)
        timings = meter.finalists(borne, meter.alone())
        if refused := [e["digest"][:12] for e in present if e["digest"] not in timings]:
            notes.append(f"The runtime here refuses {', '.join(refused)}, or dies of it: left out")
        present = [e for e in present if e["digest"] in timings]
        if not present:
            raise BadInput(
                f"the runtime here refuses all finalists of {run_dir}; measure on a device like "
                "the one that was searched for"
            )
        if told := noise(timings, device.facts, run_dir):
            notes.append(told)
        if header.get("capabilities") != device.capabilities:
            notes.append(
                "The kernels here do int8 otherwise than those that were searched for: the metrics "
                "may not hold here (flyweight deploy checks that of the one it deploys)"
            )
        tests = {e["digest"]: e["metric_test"] for e in entries if "metric_test" in e}
        rows = final_front(header, present, tests, timings)
        new = remeasured(result, rows, timings["teacher"].median_ms, device.fingerprint)
        for digest in [e["digest"] for e in present]:
            record.append(measured_entry(digest, timings, device, tests.get(digest)))
    finally:
        record.close()
    write_json(run_dir / RESULT, new)
    if _chosen(new) != _chosen(result) or new["target"] != target:
        (run_dir / EXPLANATION).unlink(missing_ok=True)  # it is of another policy or device
    write_report(run_dir)
    return Measured(new, notes)


def check_ended(run_dir: Path, entries: list[Entry]) -> None:
    """Raises BadInput for the record of a search that was cut off."""
    if not any(e["kind"] == "search" for e in entries):
        raise BadInput(f"{run_dir / RECORD} does not say what was searched")
    open_trials = {e["trial"] for e in entries if e["kind"] == "begin"} - ends(entries).keys()
    if open_trials:
        raise BadInput(
            f"the search in {run_dir} was cut off: {len(open_trials)} trials have not ended; "
            f"{how_to_end(run_dir)}"
        )


def _chosen(result: dict[str, Any]) -> Any:
    return result["best"] or result["nearest_miss"]
