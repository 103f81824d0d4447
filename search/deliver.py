"""What a search could not tell MLflow while it ran, told afterwards from its record."""

import json
from pathlib import Path
from typing import Any

from ..spaces import BadInput, FlyweightError
from .record import Entry, FileRecord, ends
from .report import FILES as REPORT
from .run_files import RECORD, RESULT, SPEC
from .spec import load_spec
from .store import write_json
from .tracking import TRACKED, MlflowTracker, Status, tracked_at
from .tracking_process import OPENING_S, locked

DELIVERED_S = 3600.0  # until everything must be there


def deliver(run_dir: Path, uri: str | None = None) -> str:
    """Completes a search's runs in MLflow; the id of its run. uri: where RUN_DIR/spec.yaml does
    not say it, or MLflow is elsewhere now. May be repeated: what is there is found, never made
    twice. Raises BadInput, and FlyweightError if MLflow does not take everything."""
    spec = load_spec(run_dir / SPEC)
    if spec.tracking is None:
        raise BadInput(f"{run_dir}: its spec has `tracking: null`, so there is nobody to tell")
    tracking = spec.tracking.model_copy(update={"uri": uri} if uri else {})
    if "***" in tracking.uri:
        raise BadInput(
            f"{run_dir}/spec.yaml leaves the password out of {tracking.uri}: say all of it with "
            "--tracking-uri or MLFLOW_TRACKING_URI"
        )
    path = run_dir / RECORD
    if not path.is_file():
        raise BadInput(f"nothing to deliver in {run_dir}: it has no record.jsonl")
    record = FileRecord(path)  # held: a search that still runs tells MLflow itself
    try:
        entries = [entry for entry in record.entries() if entry["kind"] in TRACKED]
        if not entries:
            raise BadInput(f"nothing to deliver in {run_dir}: its record is empty")
        with locked(run_dir):
            place = tracked_at(tracking, entries[0])
            return _deliver(run_dir, entries, place, _ended(record.entries()))
    finally:
        record.close()


def _deliver(run_dir: Path, entries: list[Entry], place: tuple[Any, ...], ended: bool) -> str:
    tracker = MlflowTracker(*place, capacity=len(entries))
    for entry in entries:
        tracker.record(entry)
    tracker.wait_opened(OPENING_S)
    run_id = tracker.run_id
    done = run_dir / RESULT
    files = [run_dir / name for name in (RESULT, SPEC, *REPORT)]
    if run_id and done.is_file():
        found = json.loads(done.read_text())
        if found["mlflow_run_id"] != run_id:
            write_json(done, found | {"mlflow_run_id": run_id})
    status: Status = "FINISHED" if ended and done.is_file() else "KILLED"
    present = [file for file in files if file.is_file()]
    missing = tracker.finish(status, present, DELIVERED_S if run_id else 0.0)
    if missing.reason or run_id is None:
        raise FlyweightError(
            f"MLflow lacks up to {missing.entries} entries: {missing.reason}; the record keeps "
            "them, try again later"
        )
    return run_id


def _ended(entries: list[Entry]) -> bool:
    """Whether all trials have ended, and none was cut off."""
    told, ended = {e["trial"] for e in entries if "trial" in e}, ends(entries)
    return told == ended.keys() and all(e["reason"] != "interrupted" for e in ended.values())
