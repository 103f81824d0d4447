"""The narrow seam to whatever runs a model: a runtime loads it, a session answers with it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ..spaces.capabilities import Capabilities
from ..spaces.errors import BadInput, nearest
from .cores import cores

Array = NDArray[Any]
Inputs = Mapping[str, Array]


class Session(Protocol):
    """A loaded model."""

    def run(self, inputs: Inputs, /) -> Array:
        """The model's single output for ``inputs`` (by name, first axis the batch).

        Raises Impossible where the runtime fails.
        """


class Runtime(Protocol):
    """What loads and runs models on this machine. Making one is cheap and runs nothing."""

    @property
    def name(self) -> str:
        """The name that ``make_runtime`` knows it by."""

    @property
    def threads(self) -> int:
        """Threads that one call may use."""

    @property
    def capabilities(self) -> Capabilities:
        """What the kernels can do here, read from the machine."""

    @property
    def device(self) -> dict[str, str]:
        """What the fingerprint is made of: whatever latency and arithmetic depend on."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits; the same for the same ``device``, in every process."""

    def load(self, model: bytes | Path, /) -> Session:
        """The ONNX file, or its content. Raises Impossible with the reason if it does not load."""


def _onnxruntime(provider: str) -> Callable[[int], Runtime]:
    def make(threads: int) -> Runtime:
        from .onnxruntime import OnnxRuntime  # a vendor is imported when it is asked for

        return OnnxRuntime(threads, provider)

    return make


def _openvino(threads: int) -> Runtime:
    try:
        from .openvino import OpenVinoRuntime
    except ImportError as error:
        raise BadInput(
            "target.runtime: 'openvino' needs a package that is not here; in the clone, "
            f"pip install -c constraints.txt -e '.[openvino]' ({error})"
        ) from error
    return OpenVinoRuntime(threads)


RUNTIMES: dict[str, Callable[[int], Runtime]] = {
    "onnxruntime": _onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cuda": _onnxruntime("CUDAExecutionProvider"),
    "onnxruntime-tensorrt": _onnxruntime("TensorrtExecutionProvider"),
    "openvino": _openvino,
}


def make_runtime(name: str, threads: int) -> Runtime:
    """The runtime called ``name`` with ``threads`` threads a call.

    Raises BadInput for an unknown name, for a number of threads that this machine does not have
    and for a runtime that is not installed.
    """
    if name not in RUNTIMES:
        raise BadInput(f"target.runtime: unknown runtime {name!r}; {nearest(name, RUNTIMES)}")
    if not 1 <= threads <= cores():
        rule = "1 <= target.threads <= cores that this process may use must hold"
        raise BadInput(f"{rule}, but got threads={threads}, cores={cores()}")
    return RUNTIMES[name](threads)
