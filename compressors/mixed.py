"""Mixed precision (Micikevicius et al. 2018): where training multiplies in bfloat16.

Weights, losses and the optimizer stay in float32, and what sums over many values does too, as
PyTorch's autocast has it. bfloat16 has the range of float32, so that no loss is scaled (Kalamkar et
al. 2019, "A study of BFLOAT16 for deep learning training").
"""

import copy
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
CHANGED = 0.002  # KL in nats, or what stands for it, by which bfloat16 may change the answers


def is_fast(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in NATIVE)


@contextmanager
def mixed(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Within it, what is called on ``device`` multiplies in bfloat16, if ``enabled``."""
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if enabled and device.type == "cpu":
            with _AttentionInFloat():
                yield
        else:
            yield


def holds(
    model: nn.Module,
    items: Items,
    answers: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> bool:
    """Whether ``model`` can be trained so: it computes and differentiates, and its answers to
    ``items`` are those that it has in float32. What it regresses may be beyond bfloat16's three
    digits, and the user's code may mix types as autocast does not."""
    tried = copy.deepcopy(model).to(device)
    weights = [p.requires_grad_() for p in tried.parameters() if p.is_floating_point()]
    try:
        items = items.to(device)
        with mixed(device):
            output = call(tried, items.inputs)
        changed = divergence(output.float(), answers.to(device))
        found = torch.autograd.grad(changed, weights, allow_unused=True)
    except Exception:  # the user's code; in float32 it ran
        return False
    finite = all(gradient.isfinite().all() for gradient in found if gradient is not None)
    return finite and abs(changed.item()) < CHANGED


class _AttentionInFloat(TorchFunctionMode):
    """On a CPU the gradient of attention takes 19 times as long in bfloat16 as in float32 (torch
    2.13, the Vision Transformer of examples/fashion_mnist)."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))

        def whole(value: Any) -> Any:
            half = isinstance(value, Tensor) and value.dtype == torch.bfloat16
            return value.float() if half else value

        with torch.autocast("cpu", enabled=False):
            named = {name: whole(value) for name, value in (kwargs or {}).items()}
            return function(*map(whole, args), **named)
