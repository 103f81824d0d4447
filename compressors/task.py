"""The task: what the user supplies. ``ClassificationTask`` fills in what is usual."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..spaces import BadInput, nearest

NOTEBOOK = "<notebook>"  # where a task is that a search was given as an object


@runtime_checkable
class Dataset(Protocol):
    """A map-style data set of (input, target); the same index gives the same item every time."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class Task(Protocol):
    """A trained model, its data, its loss and its metric.

    An input is a tensor, a tuple or a dict of tensors; items of a data set are without a batch
    axis. Optional, beside what stands here: ``test`` (a data set, looked at once, only reported);
    ``augment(inputs, generator)``, which returns a random variant of a batch of inputs; and
    ``students()``, which returns {name: module}: other networks, trained or not, that answer as the
    teacher does. A policy whose ``distill.student`` names one starts from it.
    """

    train: Dataset
    val: Dataset

    def model(self) -> nn.Module:
        """The trained model: the teacher."""

    def example_input(self) -> Any:
        """One request, batch 1."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar that can be differentiated."""

    def metric(self, output: Tensor, target: Tensor) -> float:
        """The figure of merit over all items of a data set; higher is better."""


class ClassificationTask:
    """Cross-entropy loss; accuracy in percent, so that a limit in points reads as people say it.

    Give it ``model``, ``train``, ``val`` and optionally ``test``, or derive from it.
    """

    test: Dataset | None = None

    def __init__(
        self, model: nn.Module, train: Dataset, val: Dataset, test: Dataset | None = None
    ) -> None:
        self._model, self.train, self.val, self.test = model, train, val, test

    def model(self) -> nn.Module:
        return self._model

    def example_input(self) -> Any:
        return as_batch(self.train[0][0])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:  # [N, C], [N] -> []
        return F.cross_entropy(output, target)

    def metric(self, output: Tensor, target: Tensor) -> float:  # [N, C], [N]
        if output.shape[1] == 1:
            raise ValueError(
                "one score an item has no largest: give two, or write metric(), such as "
                "100.0 * ((output[:, 0] > 0) == (target > 0.5)).double().mean().item()"
            )
        found = output.argmax(1)
        if found.shape != target.shape:
            raise ValueError(
                f"targets are to be numbers of classes, {list(found.shape)}, but are "
                f"{list(target.shape)}: of one-hot ones give .argmax()"
            )
        return 100.0 * (found == target).double().mean().item()


def metric_of(task: Any, output: Tensor, target: Any) -> float:
    """The metric of ``task``, also where it is a tensor or a numpy number of one element, as
    libraries of metrics give it; NaN for what is no number."""
    return as_number(task.metric(output, target))


def as_number(value: Any) -> float:
    """``value`` as a number; NaN for what is none."""
    try:
        number = value.item() if hasattr(value, "item") else value
        return math.nan if isinstance(number, str) else float(number)
    except (TypeError, ValueError, RuntimeError):  # a tensor of several elements
        return math.nan


def as_batch(item: Any) -> Any:
    """A single input as a batch of one."""
    if isinstance(item, Mapping):
        return {k: as_batch(v) for k, v in item.items()}
    if isinstance(item, tuple):
        return tuple(as_batch(v) for v in item)
    return torch.as_tensor(item)[None]


def task_folder(reference: str, folder: Path) -> Path:
    """The folder of the file that ``reference`` names; ``folder`` where that is not known."""
    place = reference.rpartition(":")[0]
    if place.endswith(".py"):
        return (folder / place).resolve().parent
    try:
        found = importlib.util.find_spec(place)
    except Exception:  # of a package of the user's: whoever loads the task says what it is
        found = None
    return Path(found.origin).resolve().parent if found and found.origin else folder


def describe(error: Exception) -> str:
    """An exception of the user's code, for a message."""
    what = f"{type(error).__name__}: {error}"
    place = Path(str(getattr(error, "filename", None) or "NAME"))
    if not isinstance(error, FileNotFoundError) or place.is_absolute():
        return what
    return (
        f"{what}. Workers run elsewhere, so a task's relative paths begin at its own folder, in "
        f"every process: {Path.cwd()}; put the file there (Path(__file__).parent / "
        f"{place.name!r}), or give its absolute path"
    )


def load_task(reference: str, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """The task that ``reference`` names: "file.py:Name" relative to ``folder``, or "module:Name".

    Raises BadInput if the file, the name or an argument is wrong.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise BadInput(f"task is 'file.py:Name' or 'module:Name', but got {reference!r}")
    if place == NOTEBOOK:
        raise BadInput(
            f"task: {name} was an object of the process that searched, and no file has it; write "
            "it as a class into a task.py and name that in the spec.yaml of the run"
        )
    module = _from_file(folder / place) if place.endswith(".py") else _from_module(place)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if isinstance(v, type) and n[0] != "_"]
        raise BadInput(f"task: {place} has no {name!r}; {nearest(name, known)}")
    try:
        return getattr(module, name)(**arguments)
    except TypeError as error:
        given = dict(arguments)
        raise BadInput(f"task: {reference} does not take task_args {given}: {error}") from error
    except Exception as error:  # the user's code
        raise BadInput(f"task: {reference} cannot be made: {describe(error)}") from error


def _from_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise BadInput(f"task: no file {path}")
    if str(path.parent) not in sys.path:  # the task may import its neighbours
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"flyweight_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # data sets are pickled by the name of their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"task: {path} cannot be imported: {describe(error)}") from error
    return module


def _from_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise BadInput(f"task: module {name!r} cannot be imported: {describe(error)}") from error
