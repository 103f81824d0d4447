"""Policies and spaces: what may be done to a network on a target. No runtime, no search."""

from typing import TYPE_CHECKING, Any

from .blueprint import Blueprint, Kernel, blueprint
from .capabilities import Capabilities
from .errors import BadInput, FlyweightError, Impossible, Untraceable, nearest
from .network import Group, Layer, Network, Op
from .parameter import Parameter
from .policy import Distill, Policy, Prune, Quantize
from .settings import Settings
from .space import Space

if TYPE_CHECKING:
    from .tracing import trace

__all__ = [
    "BadInput", "Blueprint", "Capabilities", "Distill", "FlyweightError", "Group", "Impossible",
    "Kernel", "Layer", "Network", "Op", "Parameter", "Policy", "Prune", "Quantize", "Settings",
    "Space", "Untraceable", "blueprint", "nearest", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # `trace` needs torch; a measuring process must not
    if name == "trace":
        from .tracing import trace

        return trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
