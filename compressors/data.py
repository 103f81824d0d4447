"""Data in memory and the splits that keep a search honest."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..spaces import BadInput, Network
from .task import Dataset, describe

# How many items a network runs at once where the number changes no result: what it computes should
# stay in the cache. MobileNetV2 at 224 x 224 takes 16 ms an image by eights and 35 by 128, in ONNX
# Runtime 4.0 and 6.0; the Fashion-MNIST ResNet 0.27 by eights, 0.20 by 32 and 0.18 by 128.
CHUNK = 4 << 20  # bytes of inputs
FEWEST, MOST = 8, 32  # items
# Items for ranges of activations, which are known long before (FACTS: 5 draws agree), and for
# batch-norm statistics: on four random policies of the ResNet the KL to the teacher was within 4%
# of that with 8,192 (on one within 8%), for a tenth of the time.
CALIBRATION = 512

FINITE = {  # what may be done where they are not
    "inputs": "fill in what is missing",
    "targets": "mark what is unknown by a number that loss and metric leave out",
}


def at_once(network: Network, most: int, room: int) -> int:
    """How many items, ``most`` at the most, run together so that the largest value of ``network``
    takes ``room`` bytes; at least two, of which there is a variance."""
    largest = max(math.prod(op.shape) for op in network.ops) * 4
    return max(2, min(most, room // largest))


def tree_map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``function`` on every tensor of an input (a tensor, a tuple or a dict)."""
    if isinstance(value, Mapping):
        return {k: tree_map(function, v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(tree_map(function, v) for v in value)
    return function(value)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an input, in order."""
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors(v)]
    return [value]


@dataclass(frozen=True)
class Items:
    """A data set, stacked: every tensor of ``inputs`` and ``targets`` has N rows."""

    inputs: Any
    targets: Any

    def __len__(self) -> int:
        return len(tensors(self.inputs)[0])

    def take(self, index: Tensor) -> "Items":
        """The items at ``index`` [n]."""
        return Items(
            tree_map(lambda t: t[index], self.inputs), tree_map(lambda t: t[index], self.targets)
        )

    def first(self, count: int) -> "Items":
        """The first ``count`` items, or all where there are fewer."""
        return self.take(torch.arange(min(count, len(self))))

    def to(self, device: torch.device) -> "Items":
        """The items on ``device``; the same tensors where they are there already."""
        return Items(
            tree_map(lambda t: t.to(device), self.inputs),
            tree_map(lambda t: t.to(device), self.targets),
        )

    @property
    def chunk(self) -> int:
        """How many items at a time a network runs fastest."""
        size = sum(t[0].numel() * t.element_size() for t in tensors(self.inputs))
        return min(MOST, max(FEWEST, CHUNK // max(1, size)))

    def chunks(self) -> Iterator["Items"]:
        """All items in order, ``chunk`` at a time."""
        return self.batches(self.chunk)

    def batches(self, size: int) -> Iterator["Items"]:
        """All items in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))))


def stack(dataset: Dataset, name: str) -> Items:
    """All of ``dataset`` in memory. Raises BadInput if it is empty, ragged or not finite, or no
    map-style data set."""
    items = []
    for index in range(_length(dataset, name)):
        try:
            items.append(dataset[index])
        except Exception as error:  # the user's code
            raise BadInput(f"task: {name}[{index}] fails: {describe(error)}") from error
        if not isinstance(items[-1], tuple | list) or len(items[-1]) != 2:
            kind = type(items[-1]).__name__
            raise BadInput(f"task: {name}[{index}] must be a pair (input, target), but is a {kind}")
    try:
        inputs, targets = default_collate(items)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadInput(
            f"task: items of {name} do not stack: {error}; all must be of one shape: pad or crop "
            "them in the data set"
        ) from error
    for what, value in (("inputs", inputs), ("targets", targets)):
        for tensor in tensors(value):
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise BadInput(f"task: {what} of {name} must be tensors or numbers, but got {kind}")
            if not _is_finite(tensor):
                odd = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
                rows = odd.nonzero().flatten().tolist()
                raise BadInput(
                    f"task: {name} has {what} that are NaN or infinite: items {rows[:5]}; leave "
                    f"such items out, or {FINITE[what]}"
                )
    return Items(tree_map(lambda t: t, inputs), targets)


def _length(dataset: Any, name: str) -> int:
    """How many items there are, which can be had by their index."""
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise BadInput(f"task: {name} is a {kind}, which gives batches; give its .dataset")
    try:
        count = len(dataset)
    except TypeError:  # an iterable data set, a generator, None
        raise BadInput(
            f"task: {name} must be a data set with a length and items by index, but is of type "
            f"{kind}, which has none; a list of its items would do"
        ) from None
    if count == 0:
        raise BadInput(f"task: {name} is empty")
    return count


def _is_finite(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no NaN and no infinity: one pass that makes nothing as large.

    torch.isfinite takes 27 times as long (240 MB of images: 10 ms for each of 0.26 s).
    """
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


@dataclass(frozen=True)
class Splits:
    """train; calibration (part of train); search and selection (halves of val); test or None.

    All but train and test are in the order in which they were drawn: the first items of them are a
    draw too, where a data set is sorted by class.
    """

    train: Items
    calibration: Items
    search: Items
    selection: Items
    test: Items | None


def split(task: Any, seed: int = 0) -> Splits:
    """The splits of ``task``. The halves of val are stratified when targets are classes."""
    train, val = stack(task.train, "train"), stack(task.val, "val")
    for name, items in (("train", train), ("val", val)):  # a variance; two halves
        if len(items) < 2:
            raise BadInput(f"task: {name} needs at least 2 items, but has {len(items)}")
    test = getattr(task, "test", None)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(train), generator=generator)[:CALIBRATION]
    first, second = _halves(val.targets, len(val))
    return Splits(
        train=train,
        calibration=train.take(picks),
        search=val.take(first),
        selection=val.take(second),
        test=None if test is None else stack(test, "test"),
    )


def _halves(targets: Any, count: int) -> tuple[Tensor, Tensor]:
    # Always the same halves, whatever the seed: selection must never have been searched on.
    index = np.arange(count)
    classes = None
    if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        numbers = np.unique(targets.numpy(), return_counts=True)[1]
        classes = targets.numpy() if numbers.min() >= 2 and len(numbers) <= count // 2 else None
    first, second = train_test_split(index, test_size=0.5, random_state=0, stratify=classes)
    return torch.from_numpy(first), torch.from_numpy(second)
