"""Runtimes and their capabilities, and honest timing of any ONNX file they are given.

A runtime (``make_runtime``) says what its kernels can do on this machine, carries the fingerprint
of the device, and loads models; ``time_sessions`` times loaded models side by side;
``int8_layers`` and ``float_layers`` count the kernels that really run. A ``DeviceProfile`` holds
what networks took on a device; from it the ``LatencyPredictor`` says what a blueprint will take.
Nothing here needs torch.
"""

from .batch import Batch, Known
from .device import saturates
from .executed import float_layers, int8_layers, optimized_kernels
from .measuring import MeasuringProcess
from .onnxruntime import OnnxRuntime
from .predictor import KernelTime, LatencyPredictor, predictor_for
from .probe import measured_weight_bits
from .profile import DeviceProfile, Timed
from .runtime import RUNTIMES, Array, Executed, Inputs, Runtime, Session, make_runtime
from .signature import Signature, signature
from .timing import Timing, disturbed, time_sessions
from .twin import SimulatedClock, SimulatedRuntime, SimulatedSession

__all__ = [
    "RUNTIMES",
    "Array",
    "Batch",
    "DeviceProfile",
    "Executed",
    "Inputs",
    "KernelTime",
    "Known",
    "LatencyPredictor",
    "MeasuringProcess",
    "OnnxRuntime",
    "Runtime",
    "Session",
    "Signature",
    "SimulatedClock",
    "SimulatedRuntime",
    "SimulatedSession",
    "Timed",
    "Timing",
    "disturbed",
    "float_layers",
    "int8_layers",
    "make_runtime",
    "measured_weight_bits",
    "optimized_kernels",
    "predictor_for",
    "saturates",
    "signature",
    "time_sessions",
]
