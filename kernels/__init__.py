"""Runtimes and their capabilities, and honest timing of any ONNX file they are given.

A runtime (``make_runtime``) says what its kernels can do on this machine, carries the fingerprint
of the device, and loads models; ``time_sessions`` times loaded models side by side;
``int8_layers`` and ``float_layers`` count the kernels that really run. Nothing here needs torch.
"""

from .device import saturates
from .executed import float_layers, int8_layers, optimized_kernels
from .onnxruntime import OnnxRuntime
from .probe import measured_weight_bits
from .runtime import RUNTIMES, Array, Executed, Inputs, Runtime, Session, make_runtime
from .timing import Timing, disturbed, time_sessions
from .twin import SimulatedClock, SimulatedRuntime, SimulatedSession

__all__ = [
    "RUNTIMES",
    "Array",
    "Executed",
    "Inputs",
    "OnnxRuntime",
    "Runtime",
    "Session",
    "SimulatedClock",
    "SimulatedRuntime",
    "SimulatedSession",
    "Timing",
    "disturbed",
    "float_layers",
    "int8_layers",
    "make_runtime",
    "measured_weight_bits",
    "optimized_kernels",
    "saturates",
    "time_sessions",
]
