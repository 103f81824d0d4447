"""Which artifact of a finished search to deploy, and what is known of it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spaces import BadInput
from .run_files import RECORD, RESULT
from .store import artifact_path, read_artifact
from .words import milliseconds


@dataclass(frozen=True)
class Artifact:
    """A chosen artifact and what is known of it. metrics: of metrics.json; model: the file."""

    digest: str
    model: bytes
    path: Path
    policy: Path
    metrics: dict[str, Any]
    latency_ms: float | None
    task: str
    target: dict[str, Any]


def read_result(run_dir: Path) -> dict[str, Any]:
    """The result.json of a run. Raises BadInput."""
    place = run_dir / RESULT
    try:
        found = json.loads(place.read_text())
    except OSError as error:
        fix = f"; {how_to_end(run_dir)}" if (run_dir / RECORD).is_file() else ""
        raise BadInput(
            f"{run_dir} is not the directory of a search that ended: {error}{fix}"
        ) from error
    except ValueError as error:
        raise BadInput(f"{place} is damaged: {error}") from error
    if not isinstance(found, dict) or not {"front", "best", "target", "task"} <= found.keys():
        raise BadInput(f"{place} is not the result of a search")
    return found


def how_to_end(run_dir: Path) -> str:
    """What to do with the run of a search that was cut off."""
    return f"go on with it: flyweight search {run_dir}/spec.yaml --out {run_dir} --resume"


def choose(
    run_dir: Path, result: dict[str, Any], digest: str | None, max_latency_ms: float | None
) -> str:
    """The digest to deploy. Raises BadInput, naming what there is."""
    front = result["front"]
    if digest is not None and max_latency_ms is not None:
        raise BadInput("give --digest or --max-latency-ms, not both")
    if digest is not None:
        known = [entry["digest"] for entry in front]
        places = sorted((run_dir / "artifacts").glob("*/metrics.json"))
        known += [p.parent.name for p in places if p.parent.name not in known]
        found = [d for d in known if d.startswith(digest)]
        if len(found) != 1 or not digest:
            problem = "is the beginning of several artifacts" if found else "is no artifact"
            listed = ", ".join(d[:12] for d in (found or known)) or "none"
            raise BadInput(f"--digest: {digest!r} {problem} of {run_dir}; known: {listed}")
        return str(found[0])
    if max_latency_ms is not None:
        within = [e for e in front if e["latency_ms"] <= max_latency_ms]
        if within:
            return str(max(within, key=lambda e: (e["metric"], -e["latency_ms"]))["digest"])
        fastest = min((e["latency_ms"] for e in front), default=None)
        there = (
            "the front is empty"
            if fastest is None
            else f"the fastest takes {milliseconds(fastest)} ms"
        )
        raise BadInput(
            f"--max-latency-ms: nothing on the front takes at most {max_latency_ms:g} ms; {there}"
        )
    if result["best"] is None:
        if miss := result.get("nearest_miss"):
            raise BadInput(
                f"no artifact of {run_dir} is within the limits of its search; the nearest miss "
                f"can be had with --digest {miss[:12]}"
            )
        raise BadInput(
            f"{run_dir} has no artifact: no trial finished the full rung; its report.html says how "
            "they ended. Let there be more search.trials or search.time_budget in its spec, and "
            f"go on: flyweight search SPEC --out {run_dir} --resume"
        )
    return str(result["best"])


def read_chosen(run_dir: Path, result: dict[str, Any], digest: str) -> Artifact:
    """The artifact of ``digest``. Raises FlyweightError if its file is not what was scored."""
    if not re.fullmatch("[0-9a-f]{64}", digest):  # it becomes a path
        raise BadInput(f"{run_dir}/result.json: {digest!r} is not a digest")
    path = run_dir / artifact_path(digest)
    model = read_artifact(run_dir, digest)
    metrics = json.loads(path.with_name("metrics.json").read_text())
    row: dict[str, Any] = next((e for e in result["front"] if e["digest"] == digest), {})
    latency = row.get("latency_ms") if is_measured(row) else None
    return Artifact(
        digest=digest, model=model, path=path, policy=path.with_name("policy.json"),
        metrics=metrics, latency_ms=latency, task=task_name(result["task"]),
        target=result["target"],
    )  # fmt: skip


def is_measured(row: Mapping[str, Any]) -> bool:
    """Whether the latency of a row of the front was measured: one that is predicted has no
    spread."""
    return row.get("latency_spread", 0.0) is not None


def task_name(reference: str) -> str:
    """ "task.py:Net" of "/any/where/task.py:Net": the same task after its folder was moved."""
    place, _, name = reference.rpartition(":")
    return f"{Path(place).name}:{name}" if place.endswith(".py") else reference


def kebab(task: str) -> str:
    """The name of a task's models: "fashion-mnist" for "task.py:FashionMnist"."""
    name = task.rpartition(":")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", "-", name).lower()
