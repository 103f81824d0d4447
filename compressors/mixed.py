"""Mixed precision (Micikevicius et al. 2018): training multiplies in bfloat16.

Weights, their gradients, the loss and the optimizer stay in float32; PyTorch's autocast says what
is computed in bfloat16. That has the range of float32, so that no loss is scaled (Kalamkar et al.
2019, "A study of BFLOAT16 for deep learning training"). Which students train so: ``bfloat16``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# What processors call their own products of bfloat16; without, they are emulated and slower than
# those of float32.
NATIVE = ("avx512_bf16", "amx_bf16")
# On a CPU these stay in float32. The gradient of attention took 19 times as long in bfloat16 (torch
# 2.13, the Vision Transformer of examples/fashion_mnist). Probabilities near 1 round to 1, and
# their logarithms to infinity.
IN_FLOAT = {
    F.scaled_dot_product_attention, F.multi_head_attention_forward,
    torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, F.logsigmoid,
    torch.softmax, Tensor.softmax, F.softmax, F.softmin, F.gumbel_softmax, torch.special.softmax,
    torch.log_softmax, Tensor.log_softmax, F.log_softmax, torch.special.log_softmax,
    torch.logsumexp, Tensor.logsumexp, torch.cumsum, Tensor.cumsum,
    torch.exp, Tensor.exp, torch.log, Tensor.log, torch.log1p, Tensor.log1p,
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


def is_native(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 and later
    return any(able.get(name) for name in NATIVE)


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
