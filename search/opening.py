"""How a search begins: its run directory, and the entry that opens its record."""

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..spaces import BadInput
from .hold import Hold
from .meter import Device
from .ready import Ready, facts_of, versions
from .record import NOT_FOR_GOOD, Entry, FileRecord, Record, at_work, ends
from .run_files import PROFILE, RECORD, REQUEST, SENSITIVITY, SPEC, TEACHER
from .spec import Spec
from .storage import (
    Mirror,
    Storage,
    kept_record,
    storage_of,
    whole_lines,
    write_whole,
)
from .store import compressed_bytes
from .tracking import redact

# What to do where what a search is for good has changed, if it is no value that one sets.
BACK = {
    "teacher_digest": "let model() give the weights that it gave then",
    "data_digest": "let train, val and test be what they were then",
    "capabilities": "search for a target with the kernels of then, with the flyweight of then",
}
# What prices and limits hang on. profile: a digest of it.
SIZED_BY = ("flyweight", "versions", "target", "teacher", "objective", "predicted_by")
PRICED_BY = (*SIZED_BY, "profile")
FREE_BYTES = 200_000_000  # what a run directory may come to need


@dataclass(frozen=True)
class Kept:
    """Where a search keeps what it has: a run directory with its record, and the storage of what
    its trials make, which may be elsewhere. mirror: copies the record there then."""

    run_dir: Path
    record: FileRecord
    storage: Storage
    mirror: Mirror | None


@contextlib.contextmanager
def kept(spec: Spec, out: Path | None, resume: bool) -> Iterator[Kept]:
    """The run of a search, held by this process alone until the end. Bad input that ends it before
    it had anything leaves nothing behind. Raises BadInput."""
    fresh = out is None or not out.is_dir() or not any(out.iterdir())
    run_dir = open_run(spec, out, resume)
    with contextlib.ExitStack() as held:
        record = FileRecord(run_dir / RECORD)
        held.push(_refused(run_dir, record, fresh, spec.storage is not None))
        held.callback(record.close)
        storage, mirror = storage_of(spec, run_dir), None
        if spec.storage:
            try:
                hold = Hold(storage, f"the storage of {run_dir.name}")
            except OSError as error:
                what = redact(f"{spec.storage} cannot be written: {error}", spec.storage)
                raise BadInput(f"storage: {what}") from error
            record.holds(hold)
            if len(kept_record(spec, run_dir) or b"") > record.path.stat().st_size:
                raise BadInput(
                    f"storage: who held {run_dir.name} before has just written its last; try again"
                )
            mirror = Mirror(record.path, storage, hold.look)
            held.callback(mirror.close)
        yield Kept(run_dir, record, storage, mirror)


def _refused(run_dir: Path, record: FileRecord, fresh: bool, copied: bool) -> Callable[..., None]:
    """What leaves nothing behind where bad input ends a search that had nothing yet: no result, and
    where a storage has a copy of its record, no entry."""

    def exits(kind: type[BaseException] | None, *_: object) -> None:
        bad = fresh and kind is not None and issubclass(kind, BadInput)
        if bad and not any(copied or e["kind"] == "result" for e in record.entries()):
            unmake(run_dir)

    return exits


def open_run(spec: Spec, out: Path | None, resume: bool) -> Path:
    """The run directory, made if need be. Raises BadInput when it is not what was asked for."""
    _check_secrets(spec)
    name = spec.task.rpartition(":")[2]
    if out is None:
        earlier = sorted(Path("runs").glob(f"{name}-*/record.jsonl"))
        if resume and not earlier:
            raise BadInput(f"nothing to resume: no runs/{name}-*; say which with --out")
        out = (
            earlier[-1].parent if resume else Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
        )
    out = out.resolve()
    kept = out / RECORD
    local = whole_lines(kept.read_bytes()) if kept.is_file() else None
    copied = kept_record(spec, out)
    if local and not resume:
        raise BadInput(f"{out} holds a search already; go on with --resume or choose another --out")
    if copied and not resume:
        raise BadInput(
            f"storage: it holds a search of the name {out.name} already; go on with it with "
            "--resume or choose another --out"
        )
    # An empty one is of a search that had no trials yet.
    if resume and copied is None and local is None:
        raise BadInput(f"nothing to resume in {out}: it has no record.jsonl")
    longer, shorter = sorted((local or b"", copied or b""), key=len, reverse=True)
    if not longer.startswith(shorter):
        raise BadInput(
            f"the record in {out} and its copy in the storage each hold what the other lacks: two "
            "heads went on with one search; keep one of the two, and move the other away"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if longer != (local or b""):  # another head went on with it, and is gone
            write_whole(kept, longer)
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise BadInput(f"the run directory {out} cannot be made: {error}") from error
    if free < FREE_BYTES:
        raise BadInput(
            f"{out} has {free / 1e6:.0f} MB free; a search needs {FREE_BYTES / 1e6:.0f} MB: "
            "free some, or choose another --out"
        )
    return out


def unmake(run_dir: Path) -> None:
    """Removes what a search that was refused had put into a folder that was empty before."""
    for name in (RECORD, SPEC, TEACHER, REQUEST, PROFILE, SENSITIVITY):
        (run_dir / name).unlink(missing_ok=True)
    for folder in (run_dir / "teacher", run_dir):
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()


def _check_secrets(spec: Spec) -> None:
    """Raises BadInput for the spec of a run directory where that leaves a password out."""
    uris = {"storage": spec.storage, "tracking.uri": spec.tracking and spec.tracking.uri}
    for key, uri in uris.items():
        if uri and "***" in uri:
            raise BadInput(
                f"{key}: {uri} has its password left out, as a run directory's spec.yaml has; name "
                "the search.yaml that the search began with"
            )


def check_same(record: Record, **found: Any) -> None:
    """Raises BadInput unless what is ``found`` of a search is what that of ``record`` began with,
    if there is one, as far as its first entry has it."""
    first = next(iter(_sessions(record)), None)
    if first is None:
        return
    if "capabilities" not in first:
        raise BadInput(
            "--resume: an earlier flyweight wrote this record; begin a new search with another "
            "--out"
        )
    for name, value in found.items():
        if name in first and first[name] != value:  # an earlier flyweight wrote fewer
            raise BadInput(
                f"--resume: {name} must be what the search began with, {first[name]}, or its "
                f"results could not be compared, but is {value}; {BACK.get(name, 'set it back')}, "
                "or begin a new search with another --out"
            )


def class_of(spec: Spec) -> str:
    """The class of the task, by the name of its file: on another head that lies elsewhere. What the
    class gives is compared by its content."""
    return spec.task.rpartition("/")[2]


def lasting(ready: Ready) -> dict[str, Any]:
    """What a search is for good: results of another seed, teacher or length of a rung stand for
    nothing beside those that it has."""
    spec = ready.spec
    return {
        "task_class": class_of(spec),
        "seed": spec.search.seed,
        "rungs": spec.rungs.model_dump(),
        "teacher_digest": ready.teacher_digest,
        "data_digest": ready.data_digest,
        "capabilities": Device.of(ready.prepared.runtime).capabilities,
    }


def opening_entry(
    ready: Ready, record: Record, device: Device, latency_ms: float, bfloat16: Sequence[str]
) -> dict[str, Any]:
    """The entry that begins each session of a search whose target is ``device``; latency_ms: the
    teacher's there; bfloat16: the students that train so.

    A resumed one keeps the teacher's figures, so that its limits stay what they were.
    """
    spec, earlier = ready.spec, record.entries()
    network = ready.prepared.network
    entry = {
        "kind": "search",
        "flyweight": version("flyweight"),
        **facts_of(spec, device.fingerprint),
        **lasting(ready),
        "objective": spec.objective.model_dump(),
        "teacher": {
            "metric": ready.metric,
            "metric_test": ready.metric_test,
            "latency_ms": latency_ms,
            "size_bytes": len(ready.teacher),
            "compressed_bytes": compressed_bytes(ready.teacher),
        },
        "versions": versions(spec.target.runtime),
        "gpus": spec.resources.gpus > 0,
        "bfloat16": list(bfloat16),
        "groups": {name: group.width for name, group in network.groups.items()},
        "blocks": {name: list(block.groups) for name, block in network.blocks.items()},
        "layers": len(network.layers),
        **({"target_node": device.node} if device.node else {}),
        "layer_groups": {name: layer.out_group for name, layer in network.layers.items()},
        "search_id": secrets.token_hex(8),
        "time": time.time(),
    }
    if not earlier:
        return entry
    first = earlier[0]
    for session in _sessions(record):
        if session["target"] == entry["target"]:
            entry["teacher"] = session["teacher"]
            break
    # The task: RUN_DIR/spec.yaml says it by its path.
    return {**entry, "search_id": first["search_id"], "task": first["task"]}


def changed_target(entry: dict[str, Any], record: Record) -> bool:
    """Whether a search that begins with ``entry`` has another target than its last session."""
    earlier = _sessions(record)
    return bool(earlier) and earlier[-1]["target"] != entry["target"]


def priced_alike(entry: dict[str, Any], record: Record) -> bool:
    """Whether a search that begins with ``entry`` prices policies as its last session did, if there
    was one."""
    earlier = _sessions(record)
    return not earlier or all(earlier[-1].get(name) == entry.get(name) for name in PRICED_BY)


def known_sizes(entry: dict[str, Any], record: Record) -> dict[str, tuple[int, int]]:
    """By digest the sizes of each policy that ``record`` has a price of, in bytes, if a search that
    begins with ``entry`` works them out as all its sessions did. A profile says nothing of them."""
    for session in _sessions(record):
        if any(session.get(name) != entry.get(name) for name in SIZED_BY):
            return {}
    return {
        e["digest"]: (e["size_bytes"], e["compressed_bytes"])
        for e in record.entries()
        if e["kind"] in ("begin", "rejected") and "size_bytes" in e  # not every one has a price
    }


def is_done(record: Record, trials: int, budget_s: float | None) -> bool:
    """Whether a record holds ``trials`` trials, all of which have ended for good, or those that
    its time was spent on, as far as any could end in it."""
    begun = {e["trial"] for e in record.entries() if e["kind"] == "begin"}
    spent_s = next(reversed(at_work(record.entries())), 0.0)
    done = next((e for e in reversed(record.entries()) if e["kind"] == "done"), {})
    if begun and budget_s is not None and max(spent_s, done.get("spent_s") or 0.0) >= budget_s:
        return True
    ended = ends(record.entries())
    for_good = (e["reason"] not in NOT_FOR_GOOD for e in ended.values())
    had_s = done.get("spent_s")  # what time ended, more time lets go on
    waits = had_s and budget_s and budget_s > had_s and any(e.get("ahead") for e in ended.values())
    return len(begun) >= trials and begun == ended.keys() and all(for_good) and not waits


def asks_anew(spec: Spec, record: Record) -> bool:
    """Whether ``spec`` has limits other than the last session of ``record``."""
    earlier = _sessions(record)
    return not earlier or earlier[-1]["objective"] != spec.objective.model_dump()


def changed_limits(spec: Spec, record: Record) -> str | None:
    """By which limits ``spec`` judges otherwise than the last session of ``record``, in words; None
    if by none."""
    earlier = _sessions(record)
    if not earlier:
        return None
    was, now = earlier[-1]["objective"], spec.objective.model_dump()
    told = [
        f"{name} was {_limit(was.get(name))} and is {_limit(now[name])} now"
        for name in now
        if was.get(name) != now[name]
    ]
    return f"{'; '.join(told)}: what is known is judged anew" if told else None


def _limit(value: float | None) -> str:
    return "no limit" if value is None else f"{value}"


def target_before(record: Record) -> str | None:
    """The target node of the last session of ``record``; None if that was no node of a cluster."""
    return next((s.get("target_node") for s in reversed(_sessions(record))), None)


def _sessions(record: Record) -> list[Entry]:
    """The entries that began the sessions so far, oldest first."""
    return [entry for entry in record.entries() if entry["kind"] == "search"]
