"""From a spec to a prepared task, its space and its teacher's figures; nothing is trained."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compressors import Prepared, Schedule, compress, prepare
from ..compressors.data import Items, tensors
from ..compressors.parity import feed, run_session
from ..compressors.task import metric_of
from ..kernels import make_runtime
from ..spaces import BadInput, Policy, Space
from .limits import Limits, limits
from .run_files import TEACHER
from .spec import Spec
from .storage import write_whole
from .store import write_request
from .words import milliseconds

RECIPES = (0.5, 0.75, 1.0)  # shares of channels kept by the uniform recipes


def prepare_task(spec: Spec, answers: dict[int, torch.Tensor] | None = None) -> Prepared:
    """The prepared task of ``spec`` on its target. answers: the teacher's, where they are known."""
    runtime = make_runtime(spec.target.runtime, spec.target.threads)
    schedule = Schedule(full_epochs=spec.rungs.full_epochs, short=spec.rungs.short)
    device = torch.device("cuda" if spec.resources.gpus and torch.cuda.is_available() else "cpu")
    return prepare(spec.load_task(), runtime, schedule, answers, device)


def make_space(prepared: Prepared, spec: Spec) -> Space:
    """What ``spec`` allows to do to the networks of ``prepared``."""
    capabilities = prepared.runtime.capabilities
    if "decoupled" in spec.space.distill.losses and prepared.kind.axis is None:
        raise BadInput(
            "space.distill.losses: 'decoupled' compares classes, but by the task's loss the output "
            "is no scores of classes; leave it out"
        )
    return Space(prepared.network, capabilities, spec.space.settings(), prepared.others)


@dataclass(frozen=True)
class Ready:
    """A search that could begin. teacher: its artifact; metric, metric_test: its figures."""

    spec: Spec
    prepared: Prepared
    space: Space
    teacher: bytes
    metric: float
    metric_test: float | None

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of the training and validation data."""
        digest, splits = hashlib.sha256(), self.prepared.splits
        for items in (splits.train, splits.search, splits.selection):
            for tensor in [*tensors(items.inputs), *tensors(items.targets)]:
                digest.update(torch.as_tensor(tensor).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def limits(self, latency_ms: float) -> Limits:
        """The limits of the spec for a teacher of this latency."""
        return limits(self.spec.objective.model_dump(), self.metric, latency_ms)

    def recipes(self) -> list[Policy]:
        """The uniform recipes of people: what a search must at least have tried."""
        precisions = [p for p in ("int8", "fp32") if p in self.spec.space.quantize.precisions]
        students = self.space.settings.students
        found = [
            self.space.uniform(keep, p, student)
            for student in students
            for keep in RECIPES
            for p in precisions
        ]
        return list(dict.fromkeys(found))

    def request(self) -> dict[str, np.ndarray[Any, Any]]:
        """One request of the target's batch size under the artifact's input names."""
        return request_of(self.spec, self.prepared)

    def advice(self) -> str:
        """What may be done where a limit is out of reach of the space."""
        space = self.space.settings
        ways = ["let space.prune.min_keep be smaller"]
        if "int8" not in space.precisions:
            ways.append("allow int8")
        if not space.depth and any(network.blocks for network in self.space.networks.values()):
            ways.append("set space.prune.depth: true")
        return f"Ask for less, or {', or '.join(ways)}"

    def smallest(self) -> list[Policy]:
        """The policies that can be expected to be fastest and smallest, in each precision."""
        precisions = self.spec.space.quantize.precisions
        students = self.space.settings.students
        found = [self.space.smallest(p, student) for student in students for p in precisions]
        return list(dict.fromkeys(found))


def request_of(spec: Spec, prepared: Prepared) -> dict[str, np.ndarray[Any, Any]]:
    """One request of the target's batch size under the artifact's input names."""
    one = feed(prepared.example)
    return {k: np.repeat(v, spec.target.batch_size, axis=0) for k, v in one.items()}


def ready(spec: Spec, run_dir: Path | None = None) -> Ready:
    """Loads and checks everything; writes the teacher's artifact and a request. Raises BadInput."""
    prepared = prepare_task(spec)
    space = make_space(prepared, spec)
    untouched = compress(prepared, Policy(), "recalibrate")
    if run_dir is not None:
        write_whole(run_dir / TEACHER, untouched.model)
        write_request(run_dir, request_of(spec, prepared))
    model, splits = untouched.model, prepared.splits
    test = None if splits.test is None else score(prepared, model, splits.test)
    metric = score(prepared, model, splits.selection)
    most = spec.objective.max_drop
    if most is not None and 0 < metric <= min(1, most):  # a metric of 0 to 1
        raise BadInput(
            f"objective: max_drop {most:g} is in points of the metric, and the model itself has "
            f"{metric:.3g}: it would limit nothing; of a metric of 0 to 1, 1% is max_drop: 0.01"
        )
    return Ready(spec, prepared, space, model, metric, test)


def score(prepared: Prepared, model: bytes, items: Items) -> float:
    """The task's metric of an artifact on ``items``, in the target's runtime."""
    answers = run_session(prepared.runtime.load(model), items)
    return metric_of(prepared.task, answers, items.targets)


def teacher_answers(prepared: Prepared) -> dict[int, Any]:
    """The teacher's answers to every variant of the training data, for all workers to share: those
    that are kept."""
    for variant in range(prepared.variants):
        prepared.epoch(variant)
    return {variant: answers.numpy() for variant, answers in prepared.answers.items()}


def check_reachable(ready: Ready, bounds: Limits, cases: Sequence[Mapping[str, float]]) -> None:
    """Raises BadInput if even the smallest policies, ``cases``, miss a limit of ``COSTS``."""
    missed, spec = [], ready.spec
    for name, least in bounds.out_of_reach(cases).items():
        most = getattr(bounds, name)
        if name == "latency_ms":
            asked = "speedup" if spec.objective.speedup else name
            missed.append(
                f"{asked} {getattr(spec.objective, asked):g} means at most {milliseconds(most)} "
                f"ms, but the fastest policy of this space takes {milliseconds(least)} ms"
            )
        else:
            missed.append(
                f"{name} is {most}, but the smallest policy of this space has {least:.0f}"
            )
    if missed:
        raise BadInput(f"objective: {'; '.join(missed)}. {ready.advice()}")


def versions(runtime: str) -> dict[str, str]:
    """Versions of what a result depends on; ``runtime``: the target's."""
    names = ["flyweight", "torch", "onnx", "onnxruntime", "ray", "optuna", "torch-pruning"]
    if runtime == "openvino":  # an optional package
        names.append("openvino")
    return {name: version(name) for name in names}


def facts_of(spec: Spec, fingerprint: str) -> dict[str, Any]:
    """What every artifact of a search says about itself."""
    target = spec.target.model_dump(exclude={"profile"}) | {"fingerprint": fingerprint}
    return {"task": spec.given_task, "seed": spec.search.seed, "target": target}
