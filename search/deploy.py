"""From a finished search to a registered model: chosen, verified in a clean process, then named."""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..compressors.data import split
from ..compressors.parity import feed
from ..spaces import BadInput, FlyweightError
from .choose import Artifact, choose, kebab, read_chosen, read_result, task_name
from .folder import write_folder
from .progress import Summary, front_figures
from .spec import Spec, load_spec
from .tracking import ENVIRONMENT

TOLERANCE = 0.05  # points of the metric; the same file on the same data should give the same
VERIFY_S = 3600.0

if TYPE_CHECKING:
    from .registry import Registered, Registry

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deployed:
    """What stands in the registry. metric: on selection validation, as verified here. latency_ms:
    as measured by the search, None for an artifact off the front. misses: the limits of the search
    that it breaks, in words, as far as its figures are known. previous: the version that the alias
    named before. reused: the version existed. same_device: whether latency_ms holds here."""

    name: str
    version: str
    alias: str
    digest: str
    metric: float
    latency_ms: float | None
    misses: list[str]
    previous: str | None
    reused: bool
    same_device: bool
    folder: Path | None

    @property
    def uri(self) -> str:
        """The model's address in MLflow."""
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

    The artifact is that of ``digest`` (a unique beginning is enough), else the most accurate of the
    front within ``max_latency_ms``, else the best. ``name``: of the registered model, by default
    the task's. ``folder``: also written as files that need nothing but a runtime. ``force``: also
    under a name that another task's model has. ``spec_path``: in place of the run's own spec, whose
    task lies where the search ran.

    Raises BadInput for what cannot be chosen or named, FlyweightError for an artifact that is not
    what it says and for a registry that does not answer; nothing is registered then.
    """
    result = read_result(run_dir)
    spec = load_spec(spec_path or run_dir / "spec.yaml")
    _check_task(spec, result["task"], spec_path is not None)
    artifact = read_chosen(run_dir, result, choose(run_dir, result, digest, max_latency_ms))
    registry = _registry(registry_uri(spec, tracking_uri), name or kebab(artifact.task), alias)
    # Before the work of verifying: a name that is taken, a server that is down.
    registry.check(artifact.task, force)
    metric, fingerprint = verify(artifact, spec)
    if not (same := fingerprint == artifact.target.get("fingerprint")):
        _log.warning(
            "this is another device than the one that was measured: the metric holds, latency is "
            "measured here by `flyweight measure %s`", run_dir,
        )  # fmt: skip
    if folder is not None:
        write_folder(folder, artifact)
    experiment = spec.tracking.experiment if spec.tracking else "flyweight"
    registered = registry.register(artifact, result.get("mlflow_run_id"), experiment)
    return Deployed(
        name=registry.name, version=registered.version, alias=alias, digest=artifact.digest,
        metric=metric, latency_ms=artifact.latency_ms, misses=_misses(artifact, result),
        previous=registered.previous, reused=registered.reused, same_device=same, folder=folder,
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


def rollback(
    name: str, *, alias: str = "champion", tracking_uri: str | None = None
) -> "Registered":
    """Gives ``alias`` back to the version that had it before. Raises BadInput if none had."""
    return registry_at(tracking_uri, name, alias).roll_back()


def registry_at(uri: str | None, name: str, alias: str) -> "Registry":
    """The registered model at ``uri``, or where MLFLOW_TRACKING_URI says. Raises BadInput."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise BadInput("give --tracking-uri or set MLFLOW_TRACKING_URI: where is it registered?")
    return _registry(uri, name, alias)


def _registry(uri: str, name: str, alias: str) -> "Registry":
    for variable, value in ENVIRONMENT.items():  # before MLflow, which takes seconds, is imported
        os.environ.setdefault(variable, value)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from .registry import Registry

    return Registry(uri, name, alias)


def registry_uri(spec: Spec, given: str | None) -> str:
    """Where to register: as given, else where the search was tracked."""
    uri = given or (spec.tracking.uri if spec.tracking else None)
    if uri is None or "***" in uri:  # a run directory keeps no password
        uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise BadInput(
            "the search keeps no address of an MLflow server with which one could register; give "
            "--tracking-uri or set MLFLOW_TRACKING_URI"
        )
    return uri


def verify(artifact: Artifact, spec: Spec) -> tuple[float, str]:
    """The metric on selection validation as a clean process gives it, and the device's fingerprint.

    Raises FlyweightError if it is not what metrics.json says, to ``TOLERANCE``.
    """
    task = spec.load_task()
    selection = split(task).selection
    with tempfile.TemporaryDirectory(prefix="flyweight-verify-") as temporary:
        place = Path(temporary)
        np.savez(place / "inputs.npz", **feed(selection.inputs))  # type: ignore[arg-type]
        report = _run_clean(artifact, place)
        outputs = torch.from_numpy(np.load(place / "output.npy", allow_pickle=False))
    metric, said = float(task.metric(outputs, selection.targets)), artifact.metrics.get("metric")
    if not isinstance(said, int | float) or not abs(metric - said) <= TOLERANCE:  # NaN too
        raise FlyweightError(
            f"artifact {artifact.digest[:12]} scores {metric:.3f} on selection validation, but "
            f"metrics.json says {said}; nothing was registered"
        )
    return metric, str(report["fingerprint"])


def _run_clean(artifact: Artifact, place: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "flyweight.search.verify", artifact.path.resolve(),
        artifact.metrics["sha256"], artifact.target["runtime"], str(artifact.target["threads"]),
        place / "inputs.npz", place / "output.npy",
    ]  # fmt: skip
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
