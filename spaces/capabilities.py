"""What a target says about itself, as far as a policy has to know it."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Capabilities:
    """What the kernels of a target can do.

    precisions: the precisions of each kind of layer, fp32 first, as ``{"conv": ("fp32", "int8")}``.
    weight_bits: bits an int8 weight may use before the target's kernels saturate. On x86 without
        VNNI, u8 x s8 products are added in pairs in saturating 16-bit arithmetic, so 7.
    width_multiple: channels in one block of the target's layout; other widths waste lanes.
    output_quantized: kinds of layers whose int8 kernel exists only if its output is quantized too.
    act_output_quantized: kinds of layers for which that is so only behind a fused activation and
        with a two-dimensional output (ONNX Runtime: Gemm and Relu fuse in float before QGemm).
    int8_ops: operations without weights that have an int8 kernel (all inputs and the output int8):
        "add"; "pool", the average of all positions; "avgpool", those of equal windows, as a
        depthwise convolution.
    """

    precisions: dict[str, tuple[str, ...]]
    weight_bits: int = 8
    width_multiple: int = 8
    output_quantized: frozenset[str] = frozenset({"conv"})
    int8_ops: frozenset[str] = frozenset({"add", "pool", "avgpool"})
    act_output_quantized: frozenset[str] = frozenset({"linear"})

    def __repr__(self) -> str:
        """The same in every process, which the order of a set is not: by a digest of it a search
        that goes on, and the nodes of a cluster, tell whether kernels are alike."""
        told = (f"{field.name}={_told(getattr(self, field.name))}" for field in fields(self))
        return f"Capabilities({', '.join(told)})"

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"2 <= weight_bits <= 8 must hold, but got {self.weight_bits}")
        if self.width_multiple < 1:
            raise ValueError(f"width_multiple >= 1 must hold, but got {self.width_multiple}")
        for kind, names in self.precisions.items():
            if not names or names[0] != "fp32":
                raise ValueError(f"precisions of {kind!r} must begin with 'fp32', but got {names}")


def _told(value: Any) -> str:
    if isinstance(value, frozenset) and value:
        return f"frozenset({{{', '.join(map(repr, sorted(value)))}}})"
    return repr(value)
