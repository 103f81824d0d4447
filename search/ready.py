"""From a spec to a prepared task, its space and its teacher's figures; nothing is trained."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compressors import Prepared, Schedule, compress, prepare
from ..compressors.answering import torch_threads
from ..compressors.bfloat16 import in_bfloat16
from ..compressors.checks import checked_metric
from ..compressors.data import Items, tensors
from ..compressors.made import Made, check_made, made_of
from ..compressors.parity import feed, run_session
from ..compressors.task import Task, describe, metric_of
from ..kernels import make_runtime
from ..spaces import BadInput, Impossible, Policy, Space
from .cache import key_of
from .limits import Limits, limits
from .run_files import SPEC, TEACHER
from .spec import Spec
from .storage import write_whole
from .store import write_request
from .words import metric_value, points

# Who allows a metric of 0 to 1 to lose so much takes it for one of percent.
PERCENT = 0.3
RECIPES = (0.5, 0.75, 1.0)  # shares of channels kept by the uniform recipes


def prepare_task(
    spec: Spec,
    answers: dict[int, torch.Tensor] | None = None,
    made: Made | None = None,
    bfloat16: Sequence[str] = (),
) -> Prepared:
    """The prepared task of ``spec`` on its target. answers: the teacher's, where they are known.
    made: what it was where the search began. bfloat16: students that train so. Raises BadInput,
    also where it is another here."""
    runtime = make_runtime(spec.target.runtime, spec.target.threads)
    schedule = Schedule(full_epochs=spec.rungs.full_epochs, short=spec.rungs.short)
    device = torch.device("cuda" if spec.resources.gpus and torch.cuda.is_available() else "cpu")
    with spec.loaded_task() as task:
        prepared = prepare(task, runtime, schedule, answers, device, bfloat16)
    if made is not None:
        check_made(prepared, made)
    return prepared


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
    """A search that could begin. teacher: its artifact; metric, metric_test: its figures.
    doubt: what is odd about them, or of the model stays as it is, in words."""

    spec: Spec
    prepared: Prepared
    space: Space
    teacher: bytes
    metric: float
    metric_test: float | None
    doubt: str | None = None

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of the training and validation data."""
        digest, splits = hashlib.sha256(), self.prepared.splits
        for items in (splits.train, splits.search, splits.selection):
            for tensor in [*tensors(items.inputs), *tensors(items.targets)]:
                digest.update(torch.as_tensor(tensor).contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def made(self) -> Made:
        """By which a worker knows whether it makes the same task."""
        return made_of(self.prepared)

    @cached_property
    def teacher_digest(self) -> str:
        """A digest of the teacher's weights. Not of its artifact: there they are folded, which
        another CPU or another flyweight rounds otherwise."""
        parts: list[str | bytes] = []
        for name, value in self.prepared.teacher.state_dict().items():
            if isinstance(value, torch.Tensor):  # a module may add what it likes
                parts += [name, value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()]
        return key_of(*parts)

    def limits(self, latency_ms: float) -> Limits:
        """The limits of the spec for a teacher of this latency."""
        return limits(self.spec.objective.model_dump(), self.metric, latency_ms)

    @property
    def too_fine(self) -> str | None:
        """Where max_drop is less than one item of selection validation counts, in words."""
        most, items = self.spec.objective.max_drop, len(self.prepared.splits.selection)
        item = per_item(self.metric, items)
        if not most or item is None or most > item * (1 - 1e-9):
            return None
        return (
            f"max_drop {most:g} is less than one item of selection validation, which counts "
            f"{points(item)} points ({items} items): it allows no loss at all; ask for more, or "
            "let val have more items"
        )

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

    def write(self, run_dir: Path) -> None:
        """Writes what a run directory keeps of it: the spec, the teacher's artifact, a request."""
        write_whole(run_dir / SPEC, self.spec.to_yaml().encode())
        if not (run_dir / TEACHER).exists():  # a resumed search is judged by the teacher of then
            write_whole(run_dir / TEACHER, self.teacher)
        write_request(run_dir, self.request())

    def advice(self) -> str:
        """What may be done where a limit is out of reach of the space."""
        space = self.space.settings
        ways = []
        narrower = replace(self.space, settings=replace(space, min_keep=1e-9))
        if narrower.widths != self.space.widths:  # else multiple_of is what holds them
            ways.append("let space.prune.min_keep be smaller")
        if "int8" not in space.precisions:
            ways.append("allow int8")
        if not space.depth and any(network.blocks for network in self.space.networks.values()):
            ways.append("set space.prune.depth: true")
        return ", or ".join(["Ask for less", *ways])

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


def ready(spec: Spec) -> Ready:
    """Loads and checks everything. Raises BadInput."""
    prepared = prepare_task(spec)
    space = make_space(prepared, spec)
    task, splits = prepared.task, prepared.splits
    checked_metric(task, prepared.search_answers, splits.search.targets, "val")
    model = compress(prepared, Policy(), "recalibrate").model
    answers = run_session(prepared.runtime.load(model), splits.selection)
    metric = checked_metric(task, answers, splits.selection.targets, "val")
    test, untested = tested(prepared, model)
    most = spec.objective.max_drop
    if most is not None and 0 < metric <= 1 and most >= min(metric, PERCENT):
        raise BadInput(
            f"objective: max_drop {most:g} is in points of the metric, and the model itself has "
            f"{metric:.3g}: next to nothing would be asked of it; of a metric of 0 to 1, 1% is "
            "max_drop: 0.01"
        )
    whole = dict.fromkeys(start.whole for start in prepared.starts.values())
    doubts = filter(None, (_doubt(task, answers, splits.selection, metric), untested, *whole))
    return Ready(spec, prepared, space, model, metric, test, " ".join(doubts) or None)


def per_item(metric: float, items: int) -> float | None:
    """What one of ``items`` counts in a ``metric`` that is the share of the right ones, of 1 or in
    per cent; None for another metric, of which that is not known."""
    for whole in (1.0, 100.0):
        right = metric * items / whole
        if 0 < metric <= whole and abs(right - round(right)) < 1e-6:
            return whole / items
    return None


def _doubt(task: Task, answers: torch.Tensor, items: Items, metric: float) -> str | None:
    """What a user should look at before all else: a metric by which the model is no better on
    its items than on those of others."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    by_chance = metric_of(task, answers, items.take(order).targets)
    if metric > by_chance:
        return None
    return (
        f"the metric of the model is {metric_value(metric)}, and {metric_value(by_chance)} where "
        "the targets are shuffled: is the model trained, and is more of the metric better? (Of an "
        "error, let metric() return the negative.)"
    )


def score(prepared: Prepared, model: bytes, items: Items) -> float:
    """The task's metric of an artifact on ``items``, in the target's runtime."""
    answers = run_session(prepared.runtime.load(model), items)
    return metric_of(prepared.task, answers, items.targets)


def tested(prepared: Prepared, model: bytes) -> tuple[float | None, str | None]:
    """The metric of an artifact on test, None without one; and why there is none though there are
    items: as it is only reported, a metric that fails there costs nothing else. Raises Impossible
    where the runtime refuses the artifact."""
    if prepared.splits.test is None:
        return None, None
    try:
        metric = score(prepared, model, prepared.splits.test)
    except Impossible:
        raise
    except Exception as error:  # the user's code
        return None, f"There is no metric on test: it fails there: {describe(error)}"
    if not math.isfinite(metric):
        return None, f"There is no metric on test: it is {metric} there"
    return metric, None


def teacher_answers(prepared: Prepared) -> dict[int, Any]:
    """The teacher's answers to every variant of the training data, for all workers to share: those
    that are kept."""
    for variant in range(prepared.variants):
        prepared.epoch(variant)
    return {variant: answers.numpy() for variant, answers in prepared.answers.items()}


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


def trained_in_bfloat16(spec: Spec, prepared: Prepared, students: Sequence[str]) -> list[str]:
    """Those of ``students`` that are to train so, tried with the threads of the workers."""
    with torch_threads(max(1, int(spec.resources.cpus))):
        return in_bfloat16(prepared, students, spec.resources.gpus > 0)
