"""What every compression of a task needs, worked out once per process."""

import copy
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import Runtime
from ..spaces import (
    BadInput,
    Blueprint,
    Impossible,
    Network,
    Policy,
    Untraceable,
    blueprint,
    nearest,
)
from ..spaces.tracing import arguments, trace, trace_graph
from .answering import answers_of
from .checks import check, check_request, check_values
from .data import Items, Splits, split, tensors
from .distill import CPU, Asked, Epoch
from .mixed import is_native
from .modules import with_modules
from .outputs import OutputKind, kind_of
from .prune import importance, lay_out
from .reconstruct import Moments, input_moments
from .spelled_out import kept_whole, spelled_out
from .task import Task, describe
from .unwrapped import unwrapped

KNOWN_BY = 512  # items of search validation by which the kind of the output is known
KEPT = 2 << 30  # bytes of the teacher's answers, in every process: of segmentations they are more
MAX_VARIANTS = 3  # augmented copies of the training data: the teacher answers each beforehand
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Schedule:
    """How much training a rung is worth. ``short``: share of ``full_epochs``; batch: samples."""

    full_epochs: float = 2.0
    short: float = 0.1
    batch: int = 128


@dataclass(frozen=True)
class Start:
    """What a student starts from: the teacher, or another network of the task; and its trace.
    whole: what of it stays as it is though it has weights, and why, in words."""

    model: nn.Module
    network: Network
    whole: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A task with its traced teacher, its splits and the target's runtime.

    starts: by the name of the student, "pruned" for the teacher. device: where students train.
    answers: the teacher's answers to each variant of the training data, [N, ...] each; those that
    are missing are computed when they are needed, and not kept where they are too large. bfloat16:
    students that train so, where the device can.
    """

    task: Any
    example: Any
    starts: Mapping[str, Start]
    splits: Splits
    runtime: Runtime
    schedule: Schedule
    answers: dict[int, Tensor] = field(default_factory=dict)
    device: torch.device = CPU
    bfloat16: frozenset[str] = frozenset()

    def trains_in_bfloat16(self, student: str) -> bool:
        return student in self.bfloat16 and is_native(self.device)

    def training_in_bfloat16(self, students: Iterable[str]) -> "Prepared":
        """The same task, with all that is known of it, of which ``students`` train so."""
        other = copy.copy(self)
        object.__setattr__(other, "bfloat16", frozenset(students))
        return other

    @property
    def teacher(self) -> nn.Module:
        return self.starts["pruned"].model

    @property
    def network(self) -> Network:
        """The teacher's."""
        return self.starts["pruned"].network

    @property
    def others(self) -> dict[str, Network]:
        """The networks of the task's ``students()``, by name."""
        return {name: s.network for name, s in self.starts.items() if name != "pruned"}

    def start(self, policy: Policy) -> Start:
        """What the student of ``policy`` starts from. Raises Impossible if the task has none."""
        if policy.student not in self.starts:
            what = nearest(policy.student, self.starts)
            raise Impossible(f"the task has no student {policy.student!r}; {what}")
        return self.starts[policy.student]

    def plan(self, policy: Policy) -> Blueprint:
        """The blueprint of ``policy`` on the target. Raises Impossible."""
        return blueprint(self.start(policy).network, policy, self.runtime.capabilities)

    @property
    def variants(self) -> int:
        """How many different copies of the training data there are; 1 without ``augment``."""
        if not hasattr(self.task, "augment"):
            return 1
        return min(MAX_VARIANTS, max(1, math.ceil(self.schedule.full_epochs)))

    def epoch(self, number: int) -> Epoch:
        """The training data of epoch ``number`` with the teacher's answers."""
        variant = number % self.variants
        items = self._variant(variant)
        if variant not in self.answers:
            each = self.search_answers[0].numel() * self.search_answers.element_size()
            if each * len(items) * self.variants > KEPT:
                return Epoch(items, Asked(self.teacher, items))
            self.answers[variant] = self._answers(items, "train")
        return Epoch(items, self.answers[variant])

    def _variant(self, variant: int) -> Items:
        train = self.splits.train
        if not hasattr(self.task, "augment"):
            return train
        generator = torch.Generator().manual_seed(variant)  # the same in every process
        return Items(self.task.augment(train.inputs, generator), train.targets)

    def input_moments(self, student: str) -> dict[str, Moments]:
        """Moments of the inputs of what ``student`` starts from: the same for every policy."""
        if student not in self._moments:
            start = self.starts[student]
            graph = trace_graph(start.model, self.example).requires_grad_(False)
            self._moments[student] = input_moments(graph, start.network, self.splits.calibration)
        return self._moments[student]

    @functools.cached_property
    def search_answers(self) -> Tensor:
        """The teacher's answers on search validation, [N, ...]."""
        return self._answers(self.splits.search, "val")

    @functools.cached_property
    def selection_answers(self) -> Tensor:
        """The teacher's answers on selection validation, [N, ...]."""
        return self._answers(self.splits.selection, "val")

    def _answers(self, items: Items, name: str) -> Tensor:
        """The teacher's answers to ``items`` of data set ``name``; BadInput if some are not
        finite, from which nothing could be learnt."""
        answers = answers_of(self.teacher, self.network, self.example, items)
        odd = ~answers.isfinite().reshape(len(answers), -1).all(1)
        if odd.any():
            raise BadInput(
                f"task: the model answers NaN or infinity to {int(odd.sum())} of {len(items)} "
                f"items of {name}"
            )
        return answers

    @functools.cached_property
    def kind(self) -> OutputKind:
        """What the task's output is, from the teacher's answers and the task's loss."""
        some = self.splits.search.first(KNOWN_BY)
        return kind_of(self.task.loss, self.search_answers[: len(some)], some.targets)

    def importance(self, student: str, criterion: str) -> dict[str, Tensor]:
        """Importance of the channels of what ``student`` starts from: the same for every policy."""
        if (student, criterion) not in self._importance:
            start = self.starts[student]
            self._importance[student, criterion] = importance(
                start.model, start.network, criterion,
                self.splits.calibration, self.task.loss,
            )  # fmt: skip
        return self._importance[student, criterion]

    @functools.cached_property
    def _moments(self) -> dict[str, dict[str, Moments]]:
        return {}

    @functools.cached_property
    def _importance(self) -> dict[tuple[str, str], dict[str, Tensor]]:
        return {}


def prepare(
    task: Task,
    runtime: Runtime,
    schedule: Schedule,
    answers: dict[int, Tensor] | None = None,
    device: torch.device = CPU,
    bfloat16: Iterable[str] = (),
) -> Prepared:
    """Traces and checks ``task``. Raises BadInput (Untraceable) before anything is spent."""
    for name in ("model", "example_input", "train", "val", "loss", "metric"):
        if not hasattr(task, name):
            raise BadInput(f"task: {type(task).__name__} has no {name!r}, which every task needs")
    models = {"pruned": _module(_ask(task, "model"), "model()"), **_students(task)}
    splits = split(task)
    example = _ask(task, "example_input")
    for what, inputs in (("example_input()", example), ("items of train", splits.train.inputs)):
        if halves := [t.dtype for t in tensors(inputs) if getattr(t, "dtype", None) in HALVES]:
            raise BadInput(f"task: {what} must be in float32, but got {halves[0]}: give x.float()")
    check_request(example, splits.train)
    starts = {name: _start(model, example) for name, model in models.items()}
    prepared = Prepared(
        task, example, starts, splits, runtime, schedule, dict(answers or {}), device,
        frozenset(bfloat16),
    )  # fmt: skip
    check(prepared)
    return prepared


def _module(model: Any, what: str) -> nn.Module:
    """A copy of ``model``, checked and ready to be read."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"task: {what} must be a torch.nn.Module, but got {type(model).__name__}")
    whose = "the model" if what == "model()" else what
    module = unwrapped(model, whose)
    check_values(module, whose)
    return module


def _students(task: Task) -> dict[str, nn.Module]:
    """The task's other networks, where it names any."""
    if not hasattr(task, "students"):
        return {}
    named = _ask(task, "students")
    if not isinstance(named, Mapping):
        raise BadInput(f"task: students() must be {{name: module}}, but got {named!r}")
    for name in named:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise BadInput(
                f"task: a student's name is letters, digits, '_' and '-', but got {name!r}"
            )
        if name == "pruned":
            raise BadInput("task: 'pruned' is the pruned teacher; give the student another name")
    return {name: _module(model, f"students()[{name!r}]") for name, model in named.items()}


def _start(model: nn.Module, example: Any) -> Start:
    """``model``, traced, in channels_last if it runs so: a ``view`` may ask for another layout."""
    args, kwargs = arguments(copy.deepcopy(example))
    try:
        with torch.no_grad():
            lay_out(model, torch.channels_last)(*args, **kwargs)
    except Exception:  # if it is not the layout, tracing will say what it is
        lay_out(model, torch.contiguous_format)
    try:
        start = _traced(model, example)
        start.model.requires_grad_(False)  # not before: it says what the user trains
        return start
    except Untraceable as error:
        doubles = [t for t in (*args, *kwargs.values()) if getattr(t, "dtype", 0) == torch.float64]
        hint = "; its inputs are in float64, the model's weights in float32: give x.float()"
        raise Untraceable(f"{error}{hint if doubles else ''}") from error


def _traced(model: nn.Module, example: Any) -> Start:
    """``model``, spelled out and traced; itself where only that can be: a mask may be beyond it."""
    spelled, why = spelled_out(model, example)
    plain = with_modules(spelled, example)
    try:
        return Start(plain, trace(plain, example), kept_whole(plain, why))
    except Untraceable as error:
        if plain is model:
            raise
        why = why or str(error)
    return Start(model, trace(model, example), kept_whole(model, why))


def _ask(task: Task, method: str) -> Any:
    try:
        return getattr(task, method)()
    except Exception as error:  # the user's code
        raise BadInput(f"task: {method}() fails: {describe(error)}") from error
