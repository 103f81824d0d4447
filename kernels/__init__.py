"""Runtimes and their capabilities, and honest timing of any ONNX file they are given.

A runtime (``make_runtime``) says what its kernels can do on this machine, carries the fingerprint
of the device, and loads models; ``time_sessions`` times loaded models side by side. A
``DeviceProfile`` holds what networks took on a device; from it the ``LatencyPredictor`` says what a
blueprint will take. Nothing here needs torch.
"""

from .batch import Batch, Known
from .measuring import MeasuringProcess
from .predictor import KernelTime, LatencyPredictor, predictor_for
from .profile import DeviceProfile, Timed
from .runtime import RUNTIMES, Array, Inputs, Runtime, Session, make_runtime
from .signature import Signature, signature
from .timing import Timing, disturbed, time_sessions
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
