"""What every compression of a task needs, worked out once per process."""

import copy
import functools
import math
import re
from collections.abc import Mapping
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
from ..spaces.tracing import arguments, trace
from .data import Items, Splits, split, tensors
from .distill import CPU, Asked, Epoch
from .modules import with_modules
from .outputs import OutputKind, kind_of
from .parity import run_module
from .prune import importance, lay_out
from .reconstruct import Moments, input_moments
from .spelled_out import spelled_out
from .task import Task, as_number, describe
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
    """What a student starts from: the teacher, or another network of the task; and its trace."""

    model: nn.Module
    network: Network


@dataclass(frozen=True)
class Prepared:
    """A task with its traced teacher, its splits and the target's runtime.

    starts: by the name of the student, "pruned" for the teacher. device: where students train.
    answers: the teacher's answers to each variant of the training data, [N, ...] each; those that
    are missing are computed when they are needed, and not kept where they are too large.
    """

    task: Any
    example: Any
    starts: Mapping[str, Start]
    splits: Splits
    runtime: Runtime
    schedule: Schedule
    answers: dict[int, Tensor] = field(default_factory=dict)
    device: torch.device = CPU

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
            self._moments[student] = input_moments(
                start.model, start.network, self.splits.calibration
            )
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
        answers = run_module(self.teacher, items)
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
    _check_request(example, splits.train)
    starts = {name: _start(model, example) for name, model in models.items()}
    prepared = Prepared(
        task, example, starts, splits, runtime, schedule, dict(answers or {}), device
    )
    _check(prepared)
    return prepared


def _module(model: Any, what: str) -> nn.Module:
    """A copy of ``model``, checked and ready to be read."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"task: {what} must be a torch.nn.Module, but got {type(model).__name__}")
    whose = "the model" if what == "model()" else what
    module = unwrapped(model, whose)
    _check_values(module, whose)
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


def _check_values(model: nn.Module, whose: str) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        sound = tensor.isfinite()
        if not isinstance(tensor, nn.Parameter):
            sound |= tensor == -torch.inf  # an attention mask: what is added hides
        if not sound.all():
            raise BadInput(f"task: {whose}'s {name!r} has values that are NaN or infinite")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            least = module.running_var.min().item() + module.eps
            if least <= 0:
                raise BadInput(
                    f"task: {whose}'s norm {name!r} divides by the square root of its variance + "
                    f"eps, which must be above 0, but is {least:g} in some channel; give it an eps "
                    "like 1e-5"
                )


def _check_request(example: Any, train: Items) -> None:
    """Raises BadInput if ``example`` is no batch of items as those of ``train``."""
    request, items = tensors(example), tensors(train.inputs)
    if len(request) != len(items):
        raise BadInput(
            f"task: example_input() has {len(request)} tensors, but an item of train has "
            f"{len(items)}: an input is a tensor, a tuple or a dict of tensors"
        )
    for one, stacked in zip(request, items, strict=True):
        if getattr(one, "ndim", stacked.ndim) != stacked.ndim:
            raise BadInput(
                f"task: example_input() is one request, a batch of one item: items of train have "
                f"shape {tuple(stacked.shape[1:])}, so it has {(1, *stacked.shape[1:])}, but got "
                f"{tuple(one.shape)}"
            )


def _start(model: nn.Module, example: Any) -> Start:
    """``model``, traced, in channels_last if it runs so: a ``view`` may ask for another layout."""
    args, kwargs = arguments(copy.deepcopy(example))
    try:
        with torch.no_grad():
            lay_out(model, torch.channels_last)(*args, **kwargs)
    except Exception:  # if it is not the layout, tracing will say what it is
        lay_out(model, torch.contiguous_format)
    try:
        start = _traced(with_modules(spelled_out(model, example), example), model, example)
        start.model.requires_grad_(False)  # not before: it says what the user trains
        return start
    except Untraceable as error:
        doubles = [t for t in (*args, *kwargs.values()) if getattr(t, "dtype", 0) == torch.float64]
        hint = "; its inputs are in float64, the model's weights in float32: give x.float()"
        raise Untraceable(f"{error}{hint if doubles else ''}") from error


def _traced(spelled: nn.Module, model: nn.Module, example: Any) -> Start:
    """``spelled``, traced; ``model`` itself where only that can be: a mask may be beyond it."""
    try:
        return Start(spelled, trace(spelled, example))
    except Untraceable:
        if spelled is model:
            raise
    return Start(model, trace(model, example))


def _ask(task: Task, method: str) -> Any:
    try:
        return getattr(task, method)()
    except Exception as error:  # the user's code
        raise BadInput(f"task: {method}() fails: {describe(error)}") from error


def _check(prepared: Prepared) -> None:
    """Every rule whose breach would otherwise show up only after training."""
    task, splits = prepared.task, prepared.splits
    for name in ("train", "val", "test"):
        dataset = getattr(task, name, None)
        if dataset is None:
            continue
        first, again = dataset[0], dataset[0]
        pairs = zip(_leaves(first), _leaves(again), strict=True)
        if not all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs):
            raise BadInput(
                f"task: {name}[0] gives another item each time; move random variants into "
                "augment(inputs, generator)"
            )
    some = splits.search.first(16)
    output = _answers(prepared.teacher, some, "val")
    if len(output) != len(some):
        shape = tuple(output.shape)
        raise BadInput(f"task: the model's answer to {len(some)} items has shape {shape}")
    if not torch.isfinite(output).all():
        raise BadInput("task: the model answers NaN or infinity on items of val")
    for name, start in prepared.starts.items():
        try:
            answer = run_module(start.model, some)
        except Exception as error:
            raise BadInput(f"task: student {name!r} fails on items of val: {error}") from error
        if answer.shape != output.shape:
            ours, theirs = tuple(answer.shape), tuple(output.shape)
            raise BadInput(
                f"task: a student answers with the teacher's shape, but {name!r} gives {ours} "
                f"where the teacher gives {theirs}"
            )
    loss = _loss(task, output.requires_grad_(), some.targets, "val")
    output = output.detach()
    try:
        checked_metric(task, output, some.targets, "val")
    except BadInput:  # some may lack a class, without which an area under a curve does not exist
        checked_metric(task, prepared.search_answers, splits.search.targets, "val")
    if loss.ndim or not torch.isfinite(loss):
        raise BadInput(f"task: loss must be one finite number, but got {loss.tolist()}")
    if not loss.requires_grad:
        raise BadInput("task: loss cannot be differentiated; compute it from output in torch")
    for name, items in (("train", splits.train), ("val", splits.search), ("val", splits.selection)):
        ends = items.take(_extremes(items.targets))
        _loss(task, _answers(prepared.teacher, ends, name).requires_grad_(), ends.targets, name)
    try:  # only there would it fail, in the middle of a search
        task.loss(output.to(prepared.device), some.to(prepared.device).targets)
    except Exception as error:
        raise BadInput(
            f"task: loss fails on {prepared.device}, where students train: {error}; what it holds "
            "must be moved to output.device"
        ) from error


def checked_metric(task: Task, answers: Tensor, targets: Any, name: str) -> float:
    """The metric of the teacher's answers to items of the data set ``name``. Raises BadInput where
    it fails or is no number."""
    try:
        metric = task.metric(answers, targets)
    except Exception as error:  # the user's code
        raise BadInput(_failed("metric", error, answers, targets, name)) from error
    number = as_number(metric)
    if not math.isfinite(number):
        raise BadInput(f"task: metric must be one finite number, but got {metric!r} on {name}")
    return number


def _answers(model: nn.Module, items: Items, name: str) -> Tensor:
    try:
        return run_module(model, items)
    except Exception as error:
        raise BadInput(
            f"task: the model does not take items of {name} as example_input() promises: {error}"
        ) from error


def _loss(task: Task, output: Tensor, targets: Any, name: str) -> Tensor:
    """The loss of items of the data set ``name``, tried. Raises BadInput where it fails."""
    try:
        loss = torch.as_tensor(task.loss(output, targets))
        if not loss.ndim and loss.requires_grad:  # a target in float64 fails only here
            torch.autograd.grad(loss, output, allow_unused=True)
    except Exception as error:
        raise BadInput(_failed("loss", error, output, targets, name)) from error
    return loss


def _extremes(targets: Any) -> Tensor:
    """Indices of the items with the least and the largest value among their targets: a label that
    a loss does not take is one of these."""
    ends = []
    for tensor in tensors(targets):
        if tensor.is_complex():  # it is in no order
            continue
        rows = tensor.reshape(len(tensor), -1).double()
        if rows.shape[1]:
            ends += [rows.amin(1).argmin(), rows.amax(1).argmax()]
    return torch.stack(ends) if ends else torch.arange(2)


def _failed(method: str, error: Exception, output: Tensor, targets: Any, name: str) -> str:
    """What is wrong where a method of the task fails on items of the data set ``name``: the rule
    that is broken as far as that is known, then what it was given, then its own words."""
    given = "; ".join(_told(tensor) for tensor in tensors(targets))
    return (
        f"task: {_rule(error, output, targets, name)}{method}(output, target) fails on "
        f"{len(output)} items of {name}, output {_told(output, values=False)}, target {given}: "
        f"{describe(error)}"
    )


def _told(tensor: Tensor, values: bool = True) -> str:
    """Type and shape of a tensor, and what its values lie between."""
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if not values or not tensor.numel() or tensor.is_complex():
        return text
    low, high = tensor.double().aminmax()
    return f"{text} of {low.item():g} to {high.item():g}"


def _rule(error: Exception, output: Tensor, targets: Any, name: str) -> str:
    """The rule that targets break, as far as torch's words tell, the value and the fix; or ""."""
    if not isinstance(targets, Tensor):
        return ""
    dtype, words = str(targets.dtype).removeprefix("torch."), str(error)
    if found := re.search(r"Target (-?\d+) is out of bounds", words):
        most = output.shape[1] - 1
        return (
            f"labels of {most + 1} classes, of which the output has scores, must be 0 to {most}, "
            f"but {name} has {found[1]}: number the labels from 0, or let the model answer for all "
            "classes. "
        )
    if targets.is_floating_point() and "Long" in words:
        return (
            f"labels of classes must be whole numbers, but the targets of {name} are {dtype}: give "
            "int(label). "
        )
    if not targets.is_floating_point() and re.search("Float|float", words):
        return (
            f"the loss takes targets in floats, but those of {name} are {dtype}: give "
            f"{'target.float()' if targets.ndim > 1 else 'float(target)'}. "
        )
    if "between 0 and 1" in words:
        low, high = targets.double().aminmax()
        return (
            f"the targets of this loss must lie between 0 and 1, but {name} has "
            f"{(high if high > 1 else low).item():g}. "
        )
    if targets.shape != output.shape and re.search("size|shape|dimension|multi-target", words):
        one, answer = list(targets.shape[1:]), list(output.shape[1:])
        return (
            f"the target of an item must have a shape that the loss takes, but in {name} it is "
            f"{one}, beside an answer of {answer}: for a loss of classes give one number, "
            "int(label); for one of values, the shape of the answer. "
        )
    return ""


def _leaves(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [leaf for value in item.values() for leaf in _leaves(value)]
    if isinstance(item, tuple | list):
        return [leaf for value in item for leaf in _leaves(value)]
    return [item]
