"""The Open Inference Protocol v2: requests become arrays, answers become tensors.

The protocol is KServe's ("Open Inference Protocol", kserve.github.io), with Triton's binary tensor
data extension: tensors as little-endian bytes after the JSON, whose length a header gives. All that
is wrong with a request is BadInput: the rule, the value, the fix.
"""

import json
import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json

from ..kernels import Array
from ..spaces import BadInput, nearest

HEADER = "inference-header-content-length"
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
NUMPY = {datatype: dtype for dtype, datatype in DATATYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """What the model says of an input or output. shape: None where the size is free."""

    name: str
    datatype: str
    shape: tuple[int | None, ...]

    def metadata(self) -> dict[str, Any]:
        sizes = [-1 if size is None else size for size in self.shape]
        return {"name": self.name, "datatype": self.datatype, "shape": sizes}


@dataclass(frozen=True)
class Request:
    """A valid request. inputs: in the model's order. binary: whether the output is wanted so."""

    id: str | None
    inputs: dict[str, Array]
    binary: bool


def tensors(values: list[dict[str, Any]]) -> list[Tensor]:
    """From ``folder.describe``. Raises BadInput for what JSON tensors cannot hold."""
    for value in values:
        if value["dtype"] not in DATATYPES:
            raise BadInput(
                f"MODEL: tensor {value['name']!r} is of {value['dtype']}; a served model takes and "
                f"gives {', '.join(DATATYPES)}"
            )
    return [Tensor(v["name"], DATATYPES[v["dtype"]], tuple(v["shape"])) for v in values]


class Protocol:
    """Reads requests for, and writes answers of, one model."""

    def __init__(
        self, name: str, version: str, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        self.name, self.version = name, version
        self.inputs = {tensor.name: tensor for tensor in inputs}
        self.outputs = {tensor.name: tensor for tensor in outputs}
        (self.output,) = outputs  # runtimes load only models of one output

    def read(self, body: bytes, header_bytes: str | None = None) -> Request:
        """The request in ``body``. header_bytes: the header that says where binary data begins.

        Raises BadInput.
        """
        head, tail = self._parts(body, header_bytes)
        try:
            asked = from_json(head, allow_inf_nan=False)
        except ValueError as error:
            raise BadInput(
                f"the body must be JSON, with finite numbers (no NaN, no Infinity), but: {error}"
            ) from error
        _mapping("the body", asked, {"id", "parameters", "inputs", "outputs"})
        if not isinstance(identity := asked.get("id"), str | None):
            raise BadInput(f"id must be a string, but got {_short(identity)}")
        wants = _parameters("the request", asked).get("binary_data_output", False)
        binary = self._outputs(asked.get("outputs"), wants is True)
        return Request(identity, self._inputs(asked.get("inputs"), tail), binary)

    def answer(self, request: Request, output: Array) -> tuple[bytes, str | None]:
        """The body of the answer, and the length of its JSON if binary data follows.

        Raises BadInput if JSON cannot hold the numbers.
        """
        tensor: dict[str, Any] = {
            "name": self.output.name,
            "datatype": DATATYPES[output.dtype.name],
            "shape": list(output.shape),
        }
        tail = b""
        if request.binary:
            tail = np.ascontiguousarray(output, output.dtype.newbyteorder("<")).tobytes()
            tensor["parameters"] = {"binary_data_size": len(tail)}
        else:
            tensor["data"] = output.ravel().tolist()
        answer = {"model_name": self.name, "model_version": self.version, "outputs": [tensor]}
        if request.id is not None:
            answer["id"] = request.id
        try:
            head = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
        except ValueError as error:
            raise BadInput(
                "an answer in JSON must be finite, but the model answers these inputs with NaN or "
                "infinity; give inputs as it was trained on, or ask for binary data"
            ) from error
        return head + tail, str(len(head)) if request.binary else None

    @staticmethod
    def _parts(body: bytes, header_bytes: str | None) -> tuple[bytes, memoryview]:
        if header_bytes is None:
            return body, memoryview(b"")
        digits = header_bytes.strip()
        if not re.fullmatch("[0-9]{1,18}", digits) or int(digits) > len(body):
            raise BadInput(
                f"{HEADER} must be the length of the JSON, at most that of the body, {len(body)}, "
                f"but got {_short(header_bytes)}"
            )
        return body[: int(digits)], memoryview(body)[int(digits) :]

    def _outputs(self, asked: Any, binary: bool) -> bool:
        """Whether the output is wanted as binary data."""
        if asked is None:
            return binary
        for position, output in enumerate(_list("outputs", asked)):
            where = f"outputs[{position}]"
            _mapping(where, output, {"name", "parameters"})
            self._known(f"{where}.name", output.get("name"), self.outputs)
            binary = _parameters(where, output).get("binary_data", binary) is True
        return binary

    def _inputs(self, asked: Any, tail: memoryview) -> dict[str, Array]:
        given: dict[str, Array] = {}
        for position, value in enumerate(_list("inputs", asked)):
            where = f"inputs[{position}]"
            _mapping(where, value, {"name", "shape", "datatype", "parameters", "data"})
            tensor = self.inputs[self._known(f"{where}.name", value.get("name"), self.inputs)]
            if tensor.name in given:
                raise BadInput(f"{where}: input {tensor.name!r} is given twice; leave one out")
            shape = _shape(where, value, tensor)
            size = _parameters(where, value).get("binary_data_size")
            if size is None:
                given[tensor.name] = _values(where, value, tensor, shape)
            else:
                piece, tail = _binary(where, value, tensor, shape, size, tail)
                given[tensor.name] = piece
        if missing := [name for name in self.inputs if name not in given]:
            raise BadInput(f"every input must be given, but {', '.join(missing)} is missing")
        if len(tail):
            raise BadInput(f"the inputs leave {len(tail)} bytes after the JSON over; say whose")
        rows = {
            name: array.shape[0]
            for name, array in given.items()
            if self.inputs[name].shape[:1] == (None,)
        }
        if len(set(rows.values())) > 1:
            raise BadInput(f"all inputs must have as many rows, but got {rows}")
        return {name: given[name] for name in self.inputs}

    @staticmethod
    def _known(where: str, name: Any, known: dict[str, Tensor]) -> str:
        if not isinstance(name, str) or name not in known:
            hint = nearest(name, known) if isinstance(name, str) else f"known: {', '.join(known)}"
            raise BadInput(f"{where} must be one of the model's, but got {_short(name)}; {hint}")
        return name


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _mapping(where: str, value: Any, known: set[str]) -> None:
    if not isinstance(value, dict):
        raise BadInput(f"{where} must be a JSON object, but got {_short(value)}")
    if unknown := [key for key in value if key not in known]:
        raise BadInput(f"{where}: unknown key {_short(unknown[0])}; {nearest(unknown[0], known)}")


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadInput(f"{where} must be a list of tensors, but got {_short(value)}")
    return value


def _parameters(where: str, value: dict[str, Any]) -> dict[str, Any]:
    """Those that the protocol does not know are for others, and passed over."""
    found = value.get("parameters")
    if not isinstance(found, dict | None):
        raise BadInput(f"{where}: parameters must be a JSON object, but got {_short(found)}")
    return found or {}


def _shape(where: str, value: dict[str, Any], tensor: Tensor) -> tuple[int, ...]:
    """The shape that is given, where it fits the model's."""
    if (datatype := value.get("datatype")) != tensor.datatype:
        raise BadInput(
            f"{where}.datatype must be {tensor.datatype} for input {tensor.name!r}, but got "
            f"{_short(datatype)}; convert the values"
        )
    shape, rule = value.get("shape"), [-1 if size is None else size for size in tensor.shape]
    if (
        not isinstance(shape, list)
        or len(shape) != len(tensor.shape)
        or any(type(size) is not int or size < 1 for size in shape)
        or any(fixed not in (None, s) for s, fixed in zip(shape, tensor.shape, strict=True))
    ):
        raise BadInput(
            f"{where}.shape must be {rule} for input {tensor.name!r} (-1: any size from 1), but "
            f"got {_short(shape)}; rows of several requests can be sent as one"
        )
    return tuple(shape)


def _values(where: str, value: dict[str, Any], tensor: Tensor, shape: tuple[int, ...]) -> Array:
    """JSON's ``data``, flat in row-major order or nested as ``shape``."""
    if not isinstance(data := value.get("data"), list):
        raise BadInput(f"{where}.data must be a list of values, but got {_short(data)}")
    try:
        found = np.asarray(data)
    except (ValueError, OverflowError) as error:  # lists of unequal lengths, nested too deep
        raise BadInput(f"{where}.data must be flat, or nested as its shape: {error}") from error
    count = math.prod(shape)
    if found.shape not in (shape, (count,)):
        raise BadInput(
            f"{where}.data must hold {count} values (flat, or nested as shape {list(shape)}), but "
            f"has shape {list(found.shape)}"
        )
    return _converted(f"{where}.data", found, tensor).reshape(shape)


def _converted(where: str, found: Array, tensor: Tensor) -> Array:
    """``found`` in the model's type, where no value is lost."""
    dtype = np.dtype(NUMPY[tensor.datatype])
    kinds = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[dtype.kind]
    if found.dtype.kind not in kinds:
        what = {"b": "true and false", "f": "numbers"}.get(dtype.kind, "whole numbers")
        raise BadInput(
            f"{where} must be {what} for {tensor.datatype}, but holds {_foreign(found, kinds)}"
        )
    if dtype.kind in "ui" and found.size:
        limits, (low, high) = np.iinfo(dtype), (int(found.min()), int(found.max()))
        if low < limits.min or high > limits.max:
            raise BadInput(
                f"{where} must lie in {limits.min}..{limits.max} for {tensor.datatype}, but goes "
                f"from {low} to {high}"
            )
    with np.errstate(over="ignore"):
        converted: Array = found.astype(dtype)
    return _finite(where, converted, tensor)


def _finite(where: str, found: Array, tensor: Tensor) -> Array:
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise BadInput(
            f"{where} must be finite numbers that {tensor.datatype} can hold (no NaN, no infinity, "
            f"at most {float(np.finfo(found.dtype).max):.3g}); leave such rows out or fill them in"
        )
    return found


def _foreign(found: Array, kinds: str) -> str:
    """A value that does not belong: the first, where they are of several types."""
    for value in found.ravel().tolist():
        if np.asarray(value).dtype.kind not in kinds:
            return _short(value)
    return f"values of mixed types, such as {_short(found.ravel()[0])}"


def _binary(
    where: str, value: dict[str, Any], tensor: Tensor, shape: tuple[int, ...], size: Any,
    tail: memoryview,
) -> tuple[Array, memoryview]:  # fmt: skip
    """The tensor at the beginning of ``tail``, and what comes after it."""
    dtype = np.dtype(NUMPY[tensor.datatype]).newbyteorder("<")
    expected = math.prod(shape) * dtype.itemsize
    if "data" in value or type(size) is not int or size != expected or len(tail) < size:
        raise BadInput(
            f"{where}: binary_data_size must be {expected} bytes for shape {list(shape)} of "
            f"{tensor.datatype}, without data, but got {_short(size)} with {len(tail)} bytes left"
        )
    found = np.frombuffer(tail[:size], dtype).reshape(shape)
    return _finite(where, found.astype(dtype.newbyteorder("=")), tensor), tail[size:]
