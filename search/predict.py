"""Device profiles and predictions by hand: ``flyweight profile`` and ``flyweight predict``."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..compressors import Prepared, untrained
from ..kernels import DeviceProfile, LatencyPredictor, predictor_for
from ..kernels.predictor import enough
from ..spaces import BadInput, Impossible, Policy
from .counting import counting
from .meter import Meter
from .profiling import FEW, NETWORKS, check_profile, empty_profile, make_profile, writing
from .ready import prepare_task, ready, request_of
from .spec import Spec, load_spec
from .store import read_policy

_log = logging.getLogger(__name__)


def profile(
    spec_path: Path,
    out: Path,
    *,
    like: Path | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    networks: int | None = None,
    minutes: float = 15.0,
    seed: int = 0,
    console: Console,
) -> DeviceProfile:
    """Makes the device profile ``out`` for the space of a spec, or goes on with it. like: the
    profile of another device, which it leans on."""
    spec = load_spec(spec_path)
    other = None if like is None else DeviceProfile.load(like)
    if out.is_dir():
        raise BadInput(f"{out} is a folder; name a file in it with -o")
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out):
        asked = {"runtime": runtime, "threads": threads}
        changes = {key: value for key, value in asked.items() if value is not None}
        spec = spec.model_copy(update={"target": spec.target.model_copy(update=changes)})
        torch.set_num_threads(1)  # what builds the networks must not spin while they are timed
        console.print(f"Checking {spec.task} and tracing its model", markup=False)
        found, most = ready(spec), networks or (NETWORKS if other is None else FEW)
        with counting("Networks timed", most, console) as count:
            try:
                return make_profile(
                    found, out, like=other, networks=most, seconds=60 * minutes, seed=seed,
                    say=console.print, count=count,
                )  # fmt: skip
            except KeyboardInterrupt:
                console.print(f"{out} holds what was timed; the same command goes on with it")
                raise


def predict(
    paths: Sequence[Path],
    spec_path: Path,
    profile_path: Path | None = None,
    *,
    allow_foreign: bool = False,
) -> list[dict[str, Any]]:
    """The predicted latency of each policy, in order: lower end, middle and upper end of the 90%
    interval; None for one with work that the runtime is known to die of. profile_path: by default
    the spec's target.profile. Raises BadInput."""
    policies = [read_policy(path) for path in paths]
    spec = load_spec(spec_path)
    found = named_profile(spec, spec_path, profile_path)
    prepared = prepare_task(spec)
    predictor = predictor_of(spec, prepared, found, allow_foreign=allow_foreign)
    plans = []
    for path, policy in zip(paths, policies, strict=True):
        try:
            plans.append(prepared.plan(policy))
        except Impossible as error:
            raise BadInput(f"{path}: {error}") from error
    return [
        {
            "policy": str(path), "digest": policy.digest,
            "predicted_latency_ms": ends.tolist() if np.isfinite(ends).all() else None,
        }
        for path, policy, ends in zip(paths, policies, predictor.predict(plans), strict=True)
    ]  # fmt: skip


def named_profile(spec: Spec, spec_path: Path, path: Path | None) -> DeviceProfile:
    """The device profile at ``path``, without one that of the spec. Raises BadInput."""
    found = given_profile(spec) if path is None else DeviceProfile.load(path)
    if found is None:
        raise BadInput(
            "what kernels take is known from a device profile: name one with --profile, or in "
            f"target.profile of {spec_path}; `flyweight profile --spec {spec_path}` makes one"
        )
    return found


def given_profile(spec: Spec) -> DeviceProfile | None:
    """The device profile that ``spec`` names, None if it names none. Raises BadInput, also where it
    has too few networks to predict from."""
    path = spec.target.profile
    if path is None:
        return None
    found = DeviceProfile.load(Path(path))
    try:
        enough(found)
    except BadInput as error:
        raise BadInput(f"target.profile: {path}: {error}") from error
    return found


def predictor_of(
    spec: Spec,
    prepared: Prepared,
    found: DeviceProfile,
    *,
    fingerprint: str | None = None,
    teacher_ms: float | None = None,
    allow_foreign: bool = False,
) -> LatencyPredictor:
    """The predictor for the target of ``spec``. fingerprint, teacher_ms: of the device that is the
    target, and what the teacher takes there now; without them the target is this device, where the
    teacher is timed."""
    here = prepared.runtime.fingerprint
    check_profile(found, empty_profile(spec, prepared), device=False)
    if teacher_ms is None and (allow_foreign or found.fingerprint == here):
        model = untrained(prepared, Policy())
        request = request_of(spec, prepared)
        meter = Meter(spec.target.runtime, spec.target.threads, model, request)
        teacher_ms = meter.alone()
        if meter.disturbed:
            _log.warning(
                "Something else runs on this device, and all latencies are told in units of what "
                "the teacher takes now: %s. Predict again when it is quiet",
                meter.disturbed,
            )
    return predictor_for(found, fingerprint or here, teacher_ms, allow_foreign)
