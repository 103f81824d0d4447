"""The sizes of thousands of policies of a space, for whoever solves for one."""

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..compressors import Prepared, untrained
from ..kernels import Array
from ..spaces import Impossible, Policy, Space
from .limits import Limits
from .store import compressed_bytes

KEEPS = (1.0, 0.5, 0.25)  # shares of channels of the recipes whose files are looked at
RANDOM = 8  # policies besides: a graph of both precisions has more in it than one of either

# How much more a file may have at least than worked out: on the network of the example others than
# those looked at had up to 0.4% more.
LEAST_MARGIN = 1.005

Points = NDArray[np.int64]  # [policies, axes]: the index into the choices of each axis of a space


class Sizes:
    """What the files of policies take, without building each, as shares of their limits.

    Weights are counted: what surgery leaves of each tensor. What else a file has in it (the graph,
    scales), and how well all of it packs, is learned from the files of a few untrained policies.
    """

    def __init__(self, prepared: Prepared, space: Space, limits: Limits) -> None:
        self._prepared, self._space = prepared, space
        self._limits = [limits.size_bytes, limits.compressed_bytes]
        self._contents: dict[str, _Contents] = {}
        self._files: dict[tuple[str, float], _Files] = {}

    def shares(self, points: Points, student: str, sparsity: float) -> Array:
        """[policies, limits]: of each limit that there is the share that policies of ``student``
        take at most, as far as is known."""
        if student not in self._contents:
            self._contents[student] = _Contents(self._prepared, self._space, student)
        if (student, sparsity) not in self._files:
            self._files[student, sparsity] = self._learned(student, sparsity)
        found = self._files[student, sparsity].bytes_of(self._contents[student].of(points))
        return np.stack(
            [found[:, i] / most for i, most in enumerate(self._limits) if most is not None], 1
        )

    def _learned(self, student: str, sparsity: float) -> "_Files":
        space, rng = self._space, random.Random(0)
        policies = [
            space.uniform(keep, p, student) for keep in KEEPS for p in space.settings.precisions
        ]
        for _ in range(RANDOM):
            drawn = {axis.name: axis.sample(rng) for axis in space.axes}
            policies.append(space.policy({**drawn, "student": student}))
        known: dict[Policy, tuple[int, int]] = {}
        for policy in dict.fromkeys(policies):
            values = space.values(policy) | {"sparsity": sparsity}
            with suppress(Impossible):
                model = untrained(self._prepared, space.policy(values))
                packed = compressed_bytes(model) if self._limits[1] is not None else 0
                known[policy] = len(model), packed
        points = [space.point(policy) for policy in known]
        contents = self._contents[student].of(np.array(points).reshape(-1, len(space.axes)))
        return _Files.of(contents, np.array([*known.values()], float).reshape(-1, 2))


class _Contents:
    """What is in the files of policies of one student, counted."""

    def __init__(self, prepared: Prepared, space: Space, student: str) -> None:
        start = prepared.starts[student]
        network, columns = start.network, {axis.name: j for j, axis in enumerate(space.axes)}
        lost: dict[tuple[str, int], dict[int, Points]] = {}  # along an axis, by column and choice
        layers: dict[str, tuple[int, NDArray[np.bool_]]] = {}
        for name, (owner, group) in space.groups.items():
            for slot in group.slots if owner == student else ():
                units = np.array(slot.units)
                kept = [width // group.multiple_of for width in space.widths[name]]
                gone = np.array([(units >= left).sum() for left in kept])
                lost.setdefault((slot.tensor, slot.axis), {})[columns[f"width/{name}"]] = gone
        for name, (owner, layer) in space.layers.items():
            if owner == student:
                int8 = np.array([p == "int8" for p in space.precisions[name]])
                layers[f"{layer.name}.weight"] = columns[f"precision/{name}"], int8
        modules = {op.module for op in network.ops}
        drops = {
            columns[f"drop/{name}"]: modules - {op.module for op in network.without([block]).ops}
            for name, (owner, part) in space.blocks.items()
            if owner == student
            for block in [part.name]
        }
        self._tensors = [
            _Tensor(
                tuple(tensor.shape),
                tensor.element_size(),
                {axis: lost[name, axis] for axis in range(tensor.ndim) if (name, axis) in lost},
                layers.get(name),
                [j for j, gone in drops.items() if name.rpartition(".")[0] in gone],
            )
            for name, tensor in (*start.model.named_parameters(), *start.model.named_buffers())
        ]

    def of(self, points: Points) -> Array:
        """[policies, 7]: bytes of tensors, bytes of the weights of int8 layers; then 1, elements of
        vectors (norms and biases), layers, int8 layers, and the channels that those make."""
        out = np.zeros((len(points), 7))
        out[:, 2] = 1
        for tensor in self._tensors:
            there = ~(points[:, tensor.drops] > 0).any(1)  # the choices of a drop: no, yes
            sizes = tensor.sizes(points)
            count = there * sizes.prod(1)
            int8 = np.zeros(len(points), bool)
            if tensor.int8 is not None:
                column, which = tensor.int8
                int8 = which[points[:, column]]
            out[:, 0] += ~int8 * count * tensor.bytes_each
            out[:, 1] += int8 * count
            out[:, 3] += count if len(tensor.shape) == 1 else 0
            out[:, 4] += there * (tensor.int8 is not None)
            out[:, 5] += int8 & there
            out[:, 6] += (int8 & there) * sizes[:, :1].sum(1)
        return out


@dataclass(frozen=True)
class _Tensor:
    """lost: of an axis what is gone, by the column of a point and its choice there. int8: the
    column of the precision of the layer whose weight it is, and which choices are int8. drops: the
    columns of the blocks that it goes with."""

    shape: tuple[int, ...]
    bytes_each: int
    lost: Mapping[int, Mapping[int, Points]]
    int8: tuple[int, NDArray[np.bool_]] | None
    drops: Sequence[int]

    def sizes(self, points: Points) -> Points:
        """[policies, axes of the tensor]: what is left of its shape."""
        out = np.repeat(np.array([self.shape], np.int64), len(points), 0)
        for axis, by_column in self.lost.items():
            for column, gone in by_column.items():
                out[:, axis] -= gone[points[:, column]]
        return out


@dataclass(frozen=True)
class _Files:
    """What was learned of files: bytes for each of the things counted, [things, 2], in the file and
    in it packed. margins: what some file had more than so worked out, the most, as a share, and
    no less than ``LEAST_MARGIN``."""

    bytes_each: Array
    margins: Array

    @classmethod
    def of(cls, contents: Array, found: Array) -> "_Files":
        """contents: of some files, as counted. found: [files, 2], their size, and that packed."""
        size, packed = found.T
        tensors = contents[:, :2].sum(1)  # as large as they are
        rest = _fitted(contents[:, 2:], size - tensors, size)
        each = np.stack([np.append([1, 1], rest), _fitted(contents, packed, packed)], 1)
        more = found / (contents @ each)
        return cls(each, more.max(0, initial=LEAST_MARGIN))

    def bytes_of(self, contents: Array) -> Array:
        """[policies, 2]: of files with these contents the size, and that packed, at most."""
        return contents @ self.bytes_each * self.margins


def _fitted(columns: Array, wanted: Array, of: Array) -> Array:
    """A factor for each of the columns [n, k], so that their sum is ``wanted`` [n] with the least
    squares of errors as shares ``of`` something [n]."""
    columns = columns / of[:, None]
    scale = np.abs(columns).max(0, initial=0.0)
    scale[scale == 0] = 1.0  # of what there is none of
    factors: Array = np.linalg.lstsq(columns / scale, wanted / of)[0] / scale
    return factors
