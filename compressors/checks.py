"""What is wrong with a task, told before anything is spent: each rule whose breach would otherwise
show up only after training, the value that breaks it and the fix where it is known."""

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..spaces import BadInput
from .data import Items, tensors
from .parity import run_module
from .task import Task, as_number, describe

if TYPE_CHECKING:
    from .prepared import Prepared


def check_values(model: nn.Module, whose: str) -> None:
    """Raises BadInput if a value of ``model`` is not finite, or a norm would make one so."""
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


def check_request(example: Any, train: Items) -> None:
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


def check(prepared: "Prepared") -> None:
    """Raises BadInput where the data, the loss or the metric of a task that was traced do not go
    together with its networks."""
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
            f"{_hint(model, items, error)}"
        ) from error


def _hint(model: nn.Module, items: Items, error: Exception) -> str:
    """The rule and the fix where ``error`` is of types, or ``model`` takes the first of ``items``
    alone but not twice in a batch; else "": the fault may be of one item."""
    doubles = any(tensor.dtype == torch.float64 for tensor in tensors(items.inputs))
    if doubles and re.search("double|float64", str(error), re.IGNORECASE):
        return "; items are in float64, the model's weights in float32: give x.float()"
    if not _runs(model, items.first(1)) or _runs(model, items.take(torch.tensor([0, 0]))):
        return ""
    return (
        f"; it takes one item, but not {len(items)} in a batch: batches have any size, so say "
        "view(x.shape[0], -1) for view(1, -1), and squeeze(-1) for squeeze()"
    )


def _runs(model: nn.Module, items: Items) -> bool:
    try:
        run_module(model, items)
    except Exception:
        return False
    return True


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
