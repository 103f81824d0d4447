"""From a finished search to a registered model: chosen, verified in a clean process, then named."""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compressors.data import split
from ..compressors.parity import feed
from ..compressors.task import metric_of
from ..spaces import BadInput, FlyweightError
from .choose import Artifact, choose, kebab, read_chosen, read_result, task_name
from .folder import write_folder
from .limits import point
from .registries import open_registry, remember_registry
from .run_files import REQUEST, SPEC, TEACHER
from .spec import Spec, absolute_uri, load_spec
from .store import read_request
from .summary import Summary, front_figures
from .tracking import redact

# Points of the metric, see ``point``; the same file on the same data should give the same.
TOLERANCE = 0.05
SLOWER = 1.5  # times what was measured, beside the teacher: a busy device is not as exact
VERIFY_S = 3600.0
NO_ADDRESS = (
    "the search keeps no address of an MLflow server with which one could register; give "
    "--tracking-uri or set MLFLOW_TRACKING_URI"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deployed:
    """What was verified, and stands in the registry; without one in ``folder`` alone, and version
    and tracking_uri are None. metric: on selection validation, as verified here. latency_ms: as
    measured by the search, None for an artifact off the front. verified_latency_ms: as timed
    here now, None where there was nothing to time it beside. misses: the limits of the search that
    it breaks, in words, as far as its figures are known. previous: the version that the alias named
    before. reused: the version existed. same_device: whether latency_ms holds here. tracking_uri:
    of the MLflow where it stands, without its password."""

    name: str
    version: str | None
    alias: str
    digest: str
    metric: float
    latency_ms: float | None
    verified_latency_ms: float | None
    misses: list[str]
    previous: str | None
    reused: bool
    same_device: bool
    folder: Path | None
    tracking_uri: str | None

    @property
    def uri(self) -> str:
        """The model's address in MLflow, where it is registered."""
        return f"models:/{self.name}@{self.alias}"


def deploy(
    run_dir: Path,
    *,
    digest: str | None = None,
    max_latency_ms: float | None = None,
    alias: str = "champion",
    name: str | None = None,
    tracking_uri: str | None = None,
    folder: Path | None = None,
    force: bool = False,
    spec_path: Path | None = None,
) -> Deployed:
    """Registers one artifact of a search under ``alias``, after verifying it in a clean process.
    With ``folder`` a search that was not tracked needs no registry.

    The artifact is that of ``digest`` (a unique beginning is enough), else the most accurate of the
    front within ``max_latency_ms``, else the best. ``name``: of the registered model, by default
    the task's. ``folder``: also written as files that need nothing but a runtime. ``force``: also
    under a name that another task's model has. ``spec_path``: in place of the run's own spec, whose
    task lies where the search ran.

    Raises BadInput for what cannot be chosen or named, FlyweightError for an artifact that is not
    what it says and for a registry that does not answer; nothing is registered then.
    """
    result = read_result(run_dir)
    spec = load_spec(spec_path or run_dir / SPEC)
    _check_task(spec, result["task"], spec_path is not None)
    artifact = read_chosen(run_dir, result, choose(run_dir, result, digest, max_latency_ms))
    name, uri = name or kebab(artifact.task), registry_uri(spec, tracking_uri)
    if uri is None and folder is None:
        raise BadInput(
            f"{NO_ADDRESS}. The model without one is {artifact.path}; --folder DIR verifies it and "
            "writes what a device needs"
        )
    registry = None if uri is None else open_registry(name, alias, uri)
    # Before the work of verifying: a name that is taken, a server that is down, a file not there.
    if registry is not None:
        registry.check(artifact.task, force)
    if folder is not None:
        read_request(run_dir)
    teacher = (result.get("teacher") or {}).get("metric")
    verified = verify(artifact, spec, teacher, Timing.of(run_dir, result, artifact))
    if not (same := verified.same_device):
        _log.warning(
            "this is another device than the one that was measured: the metric holds, latency is "
            "measured here by `flyweight measure %s`", run_dir,
        )  # fmt: skip
    if folder is not None:
        write_folder(folder, artifact, run_dir / REQUEST)
    deployed = Deployed(
        name=name, version=None, alias=alias, digest=artifact.digest, metric=verified.metric,
        latency_ms=artifact.latency_ms, verified_latency_ms=verified.latency_ms,
        misses=_misses(artifact, result), previous=None, reused=False, same_device=same,
        folder=folder, tracking_uri=None,
    )  # fmt: skip
    if registry is None:
        return deployed
    experiment = spec.tracking.experiment if spec.tracking else "flyweight"
    registered = registry.register(artifact, result.get("mlflow_run_id"), experiment)
    remember_registry(registry.name, registry.uri)  # for rollback and serve
    return replace(
        deployed, version=registered.version, previous=registered.previous,
        reused=registered.reused, tracking_uri=redact(absolute_uri(registry.uri, Path.cwd())),
    )  # fmt: skip


def _check_task(spec: Spec, task: str, given: bool) -> None:
    """Raises BadInput where the task of ``spec`` is not here, or not the run's ``task``."""
    place = spec.task.rpartition(":")[0]
    if place.endswith(".py") and not Path(place).is_file():
        fix = "" if given else "; of a run that was fetched, name your search.yaml with --spec"
        raise BadInput(f"task: no file {place}{fix}")
    if (found := task_name(spec.task)) != task_name(task):
        raise BadInput(f"the spec's task is {found}, but the run is of {task_name(task)}")


def _misses(artifact: Artifact, result: dict[str, Any]) -> list[str]:
    unknown = {"size_bytes": math.nan, "latency_ms": math.nan}  # which is over no limit
    known = {} if artifact.latency_ms is None else {"latency_ms": artifact.latency_ms}
    row = {**unknown, **artifact.metrics, **known, "digest": artifact.digest}
    teacher, objective = result.get("teacher"), result.get("objective") or {}
    return Summary(teacher, objective).misses(front_figures(row, teacher)) if teacher else []


def registry_uri(spec: Spec, given: str | None) -> str | None:
    """Where to register: as given, else where the search was tracked; None if it was not. Raises
    BadInput if it was, at an address that is not known whole."""
    uri = given or (spec.tracking.uri if spec.tracking else None)
    if uri is None or "***" in uri:  # a run directory keeps no password
        uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and spec.tracking is not None:
        raise BadInput(NO_ADDRESS)
    return uri or None


@dataclass(frozen=True)
class Timing:
    """What an artifact is timed beside, and how many times faster than that it should be."""

    teacher: Path
    request: Path
    speedup: float

    @classmethod
    def of(cls, run_dir: Path, result: Mapping[str, Any], artifact: Artifact) -> "Timing | None":
        """None where the latency was not measured, or what it was measured beside is not here."""
        teacher, request = run_dir / TEACHER, run_dir / REQUEST
        known = (result.get("teacher") or {}).get("latency_ms")
        if not (artifact.latency_ms and known and teacher.is_file() and request.is_file()):
            return None
        return cls(teacher.resolve(), request.resolve(), known / artifact.latency_ms)


@dataclass(frozen=True)
class Verified:
    """What a clean process found: the metric on selection validation, whether this is the device
    that the artifact was measured on, and its latency in ms, None if it was not timed."""

    metric: float
    same_device: bool
    latency_ms: float | None


def verify(
    artifact: Artifact, spec: Spec, teacher_metric: float | None, timing: Timing | None = None
) -> Verified:
    """Runs the artifact in a clean process. teacher_metric: what says how much a point is; None
    where it is not known.

    Raises FlyweightError if its metric is not what metrics.json says, to ``TOLERANCE``, or if, on
    the device that it was measured on, it is slower than it was, by more than ``SLOWER``.
    """
    with spec.loaded_task() as task:
        selection = split(task).selection
    with tempfile.TemporaryDirectory(prefix="flyweight-verify-") as temporary:
        place = Path(temporary)
        np.savez(place / "inputs.npz", **feed(selection.inputs))  # type: ignore[arg-type]
        report = _run_clean(artifact, place, timing)
        outputs = torch.from_numpy(np.load(place / "output.npy", allow_pickle=False))
    metric, said = metric_of(task, outputs, selection.targets), artifact.metrics.get("metric")
    number = said if isinstance(said, int | float) else math.nan
    allowed = TOLERANCE * point(number if teacher_metric is None else teacher_metric)
    if not abs(metric - number) <= allowed:  # NaN too
        raise FlyweightError(
            f"artifact {artifact.digest[:12]} scores {metric:.5g} on selection validation, but "
            f"metrics.json says {said}; nothing was registered"
        )
    same = report["fingerprint"] == artifact.target.get("fingerprint")
    if timing is not None and same:
        speedup = report["teacher_latency_ms"] / report["latency_ms"]
        if speedup * SLOWER < timing.speedup:
            raise FlyweightError(
                f"artifact {artifact.digest[:12]} is {speedup:.2f} times faster than the teacher, "
                f"timed here now, but {timing.speedup:.2f} times was measured; nothing was "
                "registered. Try again while nothing else runs; if it stays so, `flyweight "
                "measure` measures anew"
            )
    return Verified(metric, same, report.get("latency_ms"))


def _run_clean(artifact: Artifact, place: Path, timing: Timing | None) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "flyweight.search.verify", artifact.path.resolve(),
        artifact.metrics["sha256"], artifact.target["runtime"], str(artifact.target["threads"]),
        place / "inputs.npz", place / "output.npy",
    ]  # fmt: skip
    if timing is not None:
        command += [timing.teacher, timing.request, str(timing.speedup / SLOWER)]
    try:
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, timeout=VERIFY_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FlyweightError(f"verifying took longer than {VERIFY_S:g} s") from error
    if done.returncode != 0:
        raise FlyweightError(
            f"artifact {artifact.digest[:12]} failed in a clean process (exit code "
            f"{done.returncode}), nothing was registered: {done.stderr.strip()[-2000:]}"
        )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
