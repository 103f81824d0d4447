"""ONNX Runtime: the CPU, CUDA and TensorRT providers behind the seam of ``runtime.py``."""

from functools import cached_property
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]

from ..spaces.capabilities import Capabilities
from ..spaces.errors import BadInput, Impossible
from .device import describe, fingerprint_of, gpu
from .probe import measured_weight_bits
from .runtime import Array, Inputs

CPU, CUDA, TENSORRT = (f"{p}ExecutionProvider" for p in ("CPU", "CUDA", "Tensorrt"))
NAMES = {CPU: "onnxruntime", CUDA: "onnxruntime-cuda", TENSORRT: "onnxruntime-tensorrt"}
# A provider hands the nodes that it lacks to the next one.
CHAINS = {CPU: [CPU], CUDA: [CUDA, CPU], TENSORRT: [TENSORRT, CUDA, CPU]}

_FP32, _INT8 = ("fp32",), ("fp32", "int8")
SILENT = 4  # fatal only: every error reaches the caller as an exception anyway


def session_options(threads: int) -> Any:
    """Options that differ from a bare session's only in threads and silence."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = SILENT
    return options


class OnnxSession:
    """A model loaded by ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self._run = session.run

    def run(self, inputs: Inputs) -> Array:
        """The output. Raises Impossible with ONNX Runtime's reason."""
        try:
            output: Array = self._run(None, inputs)[0]
        except Exception as error:  # its exceptions have no base of their own
            raise Impossible(f"ONNX Runtime cannot run the model: {error}") from error
        return output


class OnnxRuntime:
    """ONNX Runtime with one execution provider. Raises BadInput where it lacks that provider."""

    def __init__(self, threads: int, provider: str = CPU) -> None:
        available = ort.get_available_providers()
        if provider not in available:
            raise BadInput(
                f"target.runtime: {NAMES[provider]!r} needs {provider}, but ONNX Runtime "
                f"{ort.__version__} has only {', '.join(available)}; on a machine with an NVIDIA "
                "GPU and its CUDA libraries, install the package onnxruntime-gpu in place of "
                "onnxruntime"
            )
        self.name = NAMES[provider]
        self.threads = threads
        self.provider = provider

    @cached_property
    def device(self) -> dict[str, str]:
        found = describe(self.name, ort.__version__, self.threads)
        return found if self.provider == CPU else {**found, "gpu": gpu()}

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.device)

    @cached_property
    def capabilities(self) -> Capabilities:
        if self.provider == CPU:
            return Capabilities(
                precisions={"conv": _INT8, "linear": _INT8},
                weight_bits=measured_weight_bits(self),
                width_multiple=8,  # the blocked layout: 8 channels with AVX2, 16 with AVX-512
                output_quantized=frozenset({"conv"}),
                int8_ops=frozenset({"add", "pool", "avgpool"}),
            )
        if self.provider == CUDA:  # not run on a GPU: runs Q/DQ in float around float convolutions
            return Capabilities(
                precisions={"conv": _FP32, "linear": _FP32},
                output_quantized=frozenset(),
                int8_ops=frozenset(),
            )
        # Not run on a GPU. TensorRT wants signed, symmetric activations (zero point 0), and its
        # int8 tensor cores work on blocks of 32 channels.
        return Capabilities(
            precisions={"conv": _INT8, "linear": _INT8},
            width_multiple=32,
            output_quantized=frozenset(),
            int8_ops=frozenset({"add"}),
        )

    def load(self, model: bytes | Path) -> OnnxSession:
        """The model, on this provider and no other. Raises Impossible if it does not load so."""
        source = str(model) if isinstance(model, Path) else model
        options = session_options(self.threads)
        try:
            session = ort.InferenceSession(source, options, providers=CHAINS[self.provider])
        except Exception as error:  # its exceptions have no base of their own
            raise Impossible(f"ONNX Runtime cannot load the model: {error}") from error
        session.disable_fallback()  # nor may a failing call move it to the CPU later
        first = session.get_providers()[0]
        if first != self.provider:  # it would fall back with no more than a warning
            raise Impossible(f"ONNX Runtime fell back from {self.provider} to {first}")
        if (outputs := len(session.get_outputs())) != 1:
            raise Impossible(f"a model has one output, but this one has {outputs}")
        return OnnxSession(session)
