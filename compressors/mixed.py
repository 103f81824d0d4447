"""Mixed precision (Micikevicius et al. 2018): where training multiplies in bfloat16.

Weights, their gradients, the loss and the optimizer stay in float32; PyTorch's autocast says what
is computed in bfloat16. That has the range of float32, so that no loss is scaled (Kalamkar et al.
2019, "A study of BFLOAT16 for deep learning training").
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .data import Items
from .prune import call

# What processors call their own products of bfloat16; without, they are emulated and slower than
# those of float32.
NATIVE = ("avx512_bf16", "amx_bf16")
ROUNDS = 3  # of a step in either, the quickest of which counts
FASTER = 1.1  # times as fast as float32 that is worth its rounding
# On a CPU these stay in float32. The gradient of attention took 19 times as long in bfloat16 (torch
# 2.13, the Vision Transformer of examples/fashion_mnist). Probabilities near 1 round to 1, and
# their logarithms to infinity.
IN_FLOAT = {
    F.scaled_dot_product_attention, F.multi_head_attention_forward,
    torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.softmax, Tensor.softmax, F.softmax,
    torch.log_softmax, Tensor.log_softmax, F.log_softmax, F.logsigmoid,
    torch.logsumexp, Tensor.logsumexp, torch.cumsum, Tensor.cumsum,
    torch.exp, Tensor.exp, torch.log, Tensor.log,
}  # fmt: skip


@contextmanager
def mixed(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Within it, what is called on ``device`` multiplies in bfloat16, if ``enabled``."""
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if enabled and device.type == "cpu":
            with _InFloat():
                yield
        else:
            yield


def holds(
    model: nn.Module,
    items: Items,
    answers: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    most: float,
    device: torch.device,
) -> bool:
    """Whether ``model`` can be trained so: it computes and differentiates, and its answers to
    ``items`` depart from ``answers``, those that it has in float32, by less than ``most``. What it
    regresses may be beyond bfloat16's three digits, and the user's code may mix types where
    autocast does not."""
    try:
        changed, gradients = _Step(model, items, answers, divergence, device)(True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # they say nothing of it
        raise
    except Exception:  # the user's code, which runs in float32
        return False
    return abs(changed) < most and all(gradient.isfinite().all() for gradient in gradients)


def is_faster(
    model: nn.Module,
    items: Items,
    answers: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> bool:
    """Whether a step of ``model``, which can be trained so, is quicker in bfloat16 than in float32:
    small layers are slower, as are convolutions of single channels."""
    step = _Step(model, items, answers, divergence, device)
    took: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + ROUNDS):  # the first sets up kernels
        for halves in (False, True):
            began = time.perf_counter()
            step(halves)
            took[halves].append(time.perf_counter() - began)
    quickest = {halves: min(each[1:]) for halves, each in took.items()}
    return quickest[False] > FASTER * quickest[True]


def is_native(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 and later
    return any(able.get(name) for name in NATIVE)


class _Step:
    """A copy of ``model`` on ``device`` to try it with; see ``holds``."""

    def __init__(
        self,
        model: nn.Module,
        items: Items,
        answers: Tensor,
        divergence: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self._model, self._items = copy.deepcopy(model).to(device), items.to(device)
        self._answers, self._divergence, self._device = answers.to(device), divergence, device
        self._weights = [
            p.requires_grad_() for p in self._model.parameters() if p.is_floating_point()
        ]
        for module in self._model.modules():  # cuDNN differentiates these in no other mode
            if isinstance(module, nn.RNNBase):
                module.train()
                module.dropout = 0.0

    def __call__(self, halves: bool) -> tuple[float, list[Tensor]]:
        """How far the answers depart, and the gradients of that."""
        with torch.random.fork_rng([]):  # what a model draws is not taken from its training
            with mixed(self._device, halves):
                output = call(self._model, self._items.inputs)
            departs = self._divergence(output.float(), self._answers)
            found = torch.autograd.grad(departs, self._weights, allow_unused=True)
        return departs.item(), [gradient for gradient in found if gradient is not None]


class _InFloat(TorchFunctionMode):
    """Computes ``IN_FLOAT`` in float32."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function not in IN_FLOAT:
            return function(*args, **(kwargs or {}))

        def whole(value: Any) -> Any:
            half = isinstance(value, Tensor) and value.dtype == torch.bfloat16
            return value.float() if half else value

        with torch.autocast("cpu", enabled=False):
            named = {name: whole(value) for name, value in (kwargs or {}).items()}
            return function(*map(whole, args), **named)
