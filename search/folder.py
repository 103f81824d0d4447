"""An artifact as a folder for a device that has a runtime and nothing of flyweight."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from ..kernels.onnxruntime import CHAINS, CPU, NAMES
from ..spaces import FlyweightError
from .choose import Artifact
from .storage import write_whole
from .store import write_json

ONNXRUNTIME = '''"""Runs model.onnx with bare onnxruntime: python example.py [BATCH]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).parent
io = json.loads((here / "io.json").read_text())
batch = int(sys.argv[1]) if len(sys.argv) > 1 else 1

options = ort.SessionOptions()
options.intra_op_num_threads = io["threads"]
session = ort.InferenceSession(here / "model.onnx", options, providers=io["providers"])

# One request of the search's data, repeated or cut to BATCH rows.
request = np.load(here / "request.npz")
inputs = {name: np.resize(rows, (batch, *rows.shape[1:])) for name, rows in request.items()}
(output,) = session.run(None, inputs)
print(output.shape, output.dtype, output[0])
'''

OPENVINO = '''"""Runs model.onnx with bare OpenVINO: python example.py [BATCH]"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov

here = Path(__file__).parent
io = json.loads((here / "io.json").read_text())
batch = int(sys.argv[1]) if len(sys.argv) > 1 else 1

# One request of the search's data, repeated or cut to BATCH rows.
request = np.load(here / "request.npz")
inputs = {name: np.resize(rows, (batch, *rows.shape[1:])) for name, rows in request.items()}
core = ov.Core()
model = core.read_model(here / "model.onnx")
model.reshape({name: array.shape for name, array in inputs.items()})  # a fixed batch is faster
compiled = core.compile_model(model, "CPU", io["settings"])
output = compiled(inputs)["output"]
print(output.shape, output.dtype, output[0])
'''


def providers(runtime: str) -> list[str]:
    """ONNX Runtime's execution providers for the runtime called ``runtime``; the CPU's for one that
    is not ONNX Runtime's."""
    return next((list(CHAINS[p]) for p, name in NAMES.items() if name == runtime), [CPU])


def _settings(target: Mapping[str, Any]) -> dict[str, Any]:
    """What example.py sets so that the model runs as it was measured."""
    if target["runtime"] == "openvino":
        from ..kernels.openvino import settings  # an optional package

        return {"threads": target["threads"], "settings": settings(target["threads"])}
    return {"threads": target["threads"], "providers": providers(target["runtime"])}


def describe(model: bytes) -> dict[str, list[dict[str, Any]]]:
    """Name, dtype (numpy's) and shape (null: the batch) of every input and output."""
    graph = onnx.load_model_from_string(model).graph
    constants = {tensor.name for tensor in graph.initializer}

    def values(infos: Any) -> list[dict[str, Any]]:
        found = []
        for info in infos:
            tensor = info.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
            found.append({"name": info.name, "dtype": dtype, "shape": sizes})
        return found

    inputs = [info for info in graph.input if info.name not in constants]
    return {"inputs": values(inputs), "outputs": values(graph.output)}


def write_folder(folder: Path, artifact: Artifact, request: Path) -> None:
    """Writes model.onnx, policy.json, io.json, example.py and the file ``request``, which the
    example runs. Raises FlyweightError."""
    io = {
        **describe(artifact.model),
        "runtime": artifact.target["runtime"],
        **_settings(artifact.target),
        "digest": artifact.digest,
        "sha256": artifact.metrics["sha256"],
    }
    try:
        write_whole(folder / "model.onnx", artifact.model)
        write_whole(folder / "policy.json", artifact.policy.read_bytes())
        write_json(folder / "io.json", io)
        write_whole(folder / "request.npz", request.read_bytes())
        example = OPENVINO if artifact.target["runtime"] == "openvino" else ONNXRUNTIME
        write_whole(folder / "example.py", example.encode())
    except OSError as error:
        raise FlyweightError(f"{folder} cannot be written: {error}") from error
