"""Whether a task gives the same each time that it is made, by a few values of all that it gives.

Every process makes it anew. No digests: what is worked out on other threads, or another CPU, is
rounded otherwise.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..spaces import BadInput
from .data import Items, tensors
from .prepared import Prepared

VALUES = 256  # of each tensor
# How far two makings may lie apart, as a share of the values' size. Of data that is rounding. Where
# model() trains, with a seed, rounding grows from step to step; other weights are 1.4 apart.
DATA, WEIGHTS = 1e-3, 0.1
NOTHING = 1e-3  # distance of weights, root mean square, that is none whatever their size

Seen = list[tuple[tuple[int, ...], Tensor]]  # of each tensor its shape and some of its values
Made = Mapping[str, Seen]  # by part, as a user calls it


def made_of(prepared: Prepared) -> Made:
    """A few values of the weights and of the data of a task."""
    splits = prepared.splits
    found: dict[str, Seen] = {}
    for name, start in prepared.starts.items():
        part = "model()" if name == "pruned" else f"students()[{name!r}]"
        state = start.model.state_dict().values()  # to which a module may add what it likes
        found[part] = [_some(tensor) for tensor in state if isinstance(tensor, Tensor)]
    found["train"] = _all(splits.train)
    found["val"] = _all(splits.search) + _all(splits.selection)
    return found


def check_made(prepared: Prepared, elsewhere: Made) -> None:
    """Raises BadInput, naming the parts, unless ``prepared`` is what was made ``elsewhere``."""
    here = made_of(prepared)
    odd = [name for name in elsewhere if _differ(name, here.get(name, []), elsewhere[name])]
    if odd:
        raise BadInput(
            f"task: {' and '.join(odd)} must be the same each time that the task is made, but a "
            "worker has others than the search began with; draw data with a seed "
            "(torch.Generator().manual_seed(0)), let model() load its trained weights, and call "
            "torch.manual_seed(0) before what students() begins at random"
        )


def _all(items: Items) -> Seen:
    return [_some(tensor) for tensor in (*tensors(items.inputs), *tensors(items.targets))]


def _some(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The shape of ``tensor`` and its values at places that are always the same."""
    flat, generator = tensor.detach().flatten(), torch.Generator().manual_seed(0)
    some = torch.randint(max(1, len(flat)), (VALUES if len(flat) else 0,), generator=generator)
    return tuple(tensor.shape), flat[some].double()


def _differ(name: str, ours: Seen, theirs: Seen) -> bool:
    if [shape for shape, _ in ours] != [shape for shape, _ in theirs]:
        return True
    share, nothing = (DATA, 0.0) if name in ("train", "val") else (WEIGHTS, NOTHING)
    return any(
        not _size(a - b) <= max(share * max(_size(a), _size(b)), nothing)  # nor with a NaN
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )


def _size(values: Tensor) -> float:
    """The root mean square, 0 of none."""
    return values.square().mean().sqrt().item() if len(values) else 0.0
