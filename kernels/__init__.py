"""Runtimes and their capabilities, and honest timing of any ONNX file they are given.

A runtime (``make_runtime``) says what its kernels can do on this machine, carries the fingerprint
of the device, and loads models; ``time_sessions`` times loaded models side by side. A
``DeviceProfile`` holds what networks took on a device; from it the ``LatencyPredictor`` says what a
blueprint will take. Nothing here needs torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .measuring import MeasuringProcess
from .profile import DeviceProfile, Timed
from .runtime import RUNTIMES, Array, Inputs, Runtime, Session, make_runtime
from .signature import Signature, signature
from .timing import Timing, disturbed, time_sessions

if TYPE_CHECKING:
    from .batch import Batch, Known
    from .predictor import KernelTime, LatencyPredictor, predictor_for
    from .twin import SimulatedClock, SimulatedRuntime

__all__ = [
    "RUNTIMES",
    "Array",
    "Batch",
    "DeviceProfile",
    "Inputs",
    "KernelTime",
    "Known",
    "LatencyPredictor",
    "MeasuringProcess",
    "Runtime",
    "Session",
    "Signature",
    "SimulatedClock",
    "SimulatedRuntime",
    "Timed",
    "Timing",
    "disturbed",
    "make_runtime",
    "predictor_for",
    "signature",
    "time_sessions",
]

# Not before they are asked for: with scipy and onnx they take a second, which a spec with a wrong
# key, or a process that measures, need not wait for.
_LATER = {
    "Batch": "batch", "Known": "batch", "KernelTime": "predictor", "LatencyPredictor": "predictor",
    "predictor_for": "predictor", "SimulatedClock": "twin", "SimulatedRuntime": "twin",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
