"""Serving: the protocol over real HTTP, real artifacts in real runtimes, a real Ray Serve."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
from onnx import TensorProto, helper, numpy_helper

from flyweight.kernels import Array, Inputs, make_runtime
from flyweight.search.serve_http import make_app
from flyweight.search.serve_model import ServedModel
from flyweight.search.serve_protocol import HEADER, Protocol, tensors
from flyweight.search.serve_source import Source, alias_of, read_path
from flyweight.spaces import BadInput, FlyweightError

TARGET = {"runtime": "onnxruntime", "threads": 1}
DIGEST = "ab" * 32


def write_model(nodes: list[Any], inputs: list[Any], columns: int, **weights: Array) -> bytes:
    graph = helper.make_graph(
        nodes,
        "m",
        inputs,
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def value(name: str, dtype: int, *sizes: Any) -> Any:
    return helper.make_tensor_value_info(name, dtype, ["batch", *sizes])


def tiny(scale: float = 1.0) -> bytes:
    """[N, 4] -> [N, 3]: the first three, times ``scale``."""
    node = helper.make_node("MatMul", ["input", "w"], ["output"])
    weight = np.eye(4, 3, dtype=np.float32) * scale
    return write_model([node], [value("input", TensorProto.FLOAT, 4)], 3, w=weight)


def broken() -> bytes:
    """As ``tiny`` from outside, but it loads nowhere: 4 columns times 5 rows."""
    node = helper.make_node("MatMul", ["input", "w"], ["output"])
    return write_model([node], [value("input", TensorProto.FLOAT, 4)], 3, w=np.ones((5, 3), "f"))


def two() -> bytes:
    """[N] and [N, 2] -> [N, 2]: rows of a table, plus numbers. It refuses rows it does not have."""
    nodes = [
        helper.make_node("Gather", ["table", "row"], ["picked"]),
        helper.make_node("Add", ["picked", "plus"], ["output"]),
    ]
    inputs = [value("row", TensorProto.INT64), value("plus", TensorProto.FLOAT, 2)]
    table = np.arange(10, dtype=np.float32).reshape(5, 2)
    return write_model(nodes, inputs, 2, table=table)


def centred() -> bytes:
    """[N, 4] -> [N, 4]: each column less its mean over the rows, which so know of each other."""
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["input", "mean"], ["output"]),
    ]
    return write_model(nodes, [value("input", TensorProto.FLOAT, 4)], 4, axes=np.array([0]))


def slow() -> bytes:
    """[N, 4] -> [N, 4], in some tenths of a second."""
    nodes, size = [helper.make_node("MatMul", ["input", "w"], ["h0"])], 700
    nodes.append(helper.make_node("Transpose", ["h0"], ["t"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["t", "h0"], ["m0"]))
    nodes += [helper.make_node("MatMul", [f"m{i}", "v"], [f"m{i + 1}"]) for i in range(20)]
    nodes.append(helper.make_node("MatMul", ["h0", "m20"], ["wide"]))
    nodes.append(helper.make_node("MatMul", ["wide", "out"], ["output"]))
    one = np.eye(size, dtype=np.float32)
    inputs = [value("input", TensorProto.FLOAT, 4)]
    return write_model(nodes, inputs, 4, w=one[:4].copy(), v=one, out=one[:, :4].copy())


def artifact(folder: Path, content: bytes, **facts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    metrics = {"sha256": hashlib.sha256(content).hexdigest(), "digest": DIGEST, "target": TARGET}
    (folder / "metrics.json").write_text(json.dumps(metrics | facts))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_artifact_is_found_by_its_folder_its_file_and_what_deploy_writes(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", tiny())
    for place in (folder, folder / "model.onnx"):
        found = read_path(place)
        assert (found.content, found.version, found.notes) == (tiny(), DIGEST[:12], ())
    told = {"sha256": hashlib.sha256(tiny()).hexdigest(), "digest": DIGEST, **TARGET}
    (folder / "metrics.json").unlink()
    (folder / "io.json").write_text(json.dumps(told))
    assert read_path(folder).runtime == "onnxruntime"
    (tmp_path / "bare.onnx").write_bytes(tiny())
    (note,) = read_path(tmp_path / "bare.onnx").notes
    assert "nothing says what its SHA-256 should be" in note
    artifact(tmp_path / "far", tiny(), target=TARGET | {"fingerprint": "0" * 16})
    assert "on another device" in read_path(tmp_path / "far").notes[0]


def test_the_best_of_a_run_is_found(tmp_path: Path) -> None:
    artifact(tmp_path / "artifacts" / DIGEST, tiny(2))
    result = {"front": [], "best": DIGEST, "target": TARGET, "task": "t.py:T"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_path(tmp_path).content == tiny(2)


def test_what_is_not_what_was_scored_is_refused(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", tiny())
    (folder / "model.onnx").write_bytes(tiny(2))
    with pytest.raises(FlyweightError, match="is not the file that was scored: its SHA-256 is"):
        read_path(folder)
    with pytest.raises(BadInput, match="unknown runtime 'none'"):
        read_path(artifact(tmp_path / "b", tiny(), target={"runtime": "none", "fingerprint": "0"}))
    with pytest.raises(FlyweightError, match=r"names no SHA-256 or no target"):
        read_path(artifact(tmp_path / "c", tiny(), sha256=None))
    (folder / "metrics.json").write_text("[")
    with pytest.raises(FlyweightError, match=r"metrics.json is damaged"):
        read_path(folder)
    with pytest.raises(BadInput, match=r"give an artifact's folder, an .onnx file, or an alias"):
        read_path(tmp_path / "none")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(BadInput, match="is no ONNX file"):
        read_path(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(BadInput, match=r"inputs and one output, but .* has 0 and 0"):
        read_path(tmp_path / "empty.onnx")


def test_an_alias_is_told_from_a_path(tmp_path: Path) -> None:
    assert alias_of("net@champion") == alias_of("models:/net@champion") == ("net", "champion")
    assert alias_of("runs/demo") is None
    assert alias_of(str(tmp_path)) is None
    with pytest.raises(BadInput, match="by an alias"):
        alias_of("models:/net/3")


def model_of(content: bytes, folder: Path, rows: int = 8) -> ServedModel:
    return ServedModel(read_path(artifact(folder, content)), rows)


def test_requests_that_run_together_get_what_each_gets_alone(tmp_path: Path) -> None:
    model = model_of(tiny(), tmp_path)
    rng = np.random.default_rng(0)
    batch = [{"input": rng.normal(size=(n, 4)).astype(np.float32)} for n in (1, 3, 1, 2)]
    answers = model.answer(batch)
    for inputs, answer in zip(batch, answers, strict=True):
        np.testing.assert_array_equal(answer, inputs["input"][:, :3])


def test_rows_that_know_of_each_other_run_with_those_of_their_own_request_alone(
    tmp_path: Path,
) -> None:
    model = model_of(centred(), tmp_path, rows=2)
    assert not model.batches
    assert model_of(tiny(), tmp_path / "tiny").batches
    assert model_of(two(), tmp_path / "two").batches
    asked = [np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32) for n in (1, 3)]
    answers = model.answer([{"input": rows} for rows in asked])
    for rows, answer in zip(asked, answers, strict=True):
        np.testing.assert_allclose(answer, rows - rows.mean(0), atol=1e-6)


def test_a_request_of_many_rows_runs_in_pieces(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(19, 4)).astype(np.float32)
    (answer,) = model_of(tiny(), tmp_path, rows=8).answer([{"input": rows}])
    np.testing.assert_array_equal(answer, rows[:, :3])


def test_who_asks_for_the_impossible_harms_no_other(tmp_path: Path) -> None:
    model = model_of(two(), tmp_path)

    def inputs(row: int) -> Inputs:
        return {"row": np.array([row]), "plus": np.zeros((1, 2), np.float32)}

    good, bad, other = model.answer([inputs(1), inputs(7), inputs(4)])
    np.testing.assert_array_equal(good, [[2, 3]])
    np.testing.assert_array_equal(other, [[8, 9]])
    assert isinstance(bad, FlyweightError)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_both_runtimes_serve(tmp_path: Path, runtime: str) -> None:
    folder = artifact(tmp_path, tiny(), target={"runtime": runtime, "threads": 1})
    rows = np.ones((3, 4), np.float32)
    (answer,) = ServedModel(read_path(folder), 4).answer([{"input": rows}])
    np.testing.assert_array_equal(answer, np.ones((3, 3)))


def test_a_copy_that_was_changed_on_the_way_is_not_loaded(tmp_path: Path) -> None:
    found = read_path(artifact(tmp_path, tiny()))
    changed = Source(**{**vars(found), "content": tiny(2)})
    with pytest.raises(FlyweightError, match="not the file that was scored"):
        ServedModel(changed, 1)


@dataclass(frozen=True)
class Server:
    url: str

    @property
    def model(self) -> str:
        return f"{self.url}/v2/models/model"

    def get(self, path: str) -> Any:
        return requests.get(self.url + path, timeout=30)

    def infer(self, asked: Any, **headers: str) -> requests.Response:
        body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        return requests.post(f"{self.model}/infer", data=body, headers=headers, timeout=60)


@contextlib.contextmanager
def over_http(content: bytes, folder: Path, most_bytes: int = 10_000) -> Iterator[Server]:
    """The protocol of a model over HTTP, in this process and without Ray."""
    model = model_of(content, folder)

    async def infer(inputs: Inputs) -> Array:
        (found,) = await asyncio.to_thread(model.answer, [inputs])
        if isinstance(found, FlyweightError):
            raise found
        return found

    io = model.source.io
    protocol = Protocol("model", "1", tensors(io["inputs"]), tensors(io["outputs"]))
    app = make_app(protocol, "onnxruntime_onnx", infer, most_bytes)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()  # else somebody took the port
            time.sleep(0.01)
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with over_http(tiny(), tmp_path_factory.mktemp("tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def two_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with over_http(two(), tmp_path_factory.mktemp("two")) as server:
        yield server


def tensor(**changes: Any) -> dict[str, Any]:
    base = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [0.5, -1, 2, 3]}
    return {key: v for key, v in (base | changes).items() if v is not ...}


def test_what_a_server_says_of_itself(tiny_server: Server) -> None:
    assert tiny_server.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert tiny_server.get("/v2/health/live").json() == {"live": True}
    assert tiny_server.get("/v2/health/ready").json() == {"ready": True}
    assert tiny_server.get("/v2/models/model/ready").json() == {"name": "model", "ready": True}
    assert tiny_server.get("/v2/models/model").json() == {
        "name": "model",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}],
    }


def test_the_version_that_answers_has_paths_of_its_own_and_no_other_has(
    tiny_server: Server,
) -> None:
    version = f"{tiny_server.model}/versions/1"
    plain = requests.get(tiny_server.model, timeout=30).json()
    assert requests.get(version, timeout=30).json() == plain
    assert requests.get(f"{version}/ready", timeout=30).json() == {"name": "model", "ready": True}
    asked = {"inputs": [tensor()]}
    got = requests.post(f"{version}/infer", json=asked, timeout=30)
    assert got.json() == tiny_server.infer(asked).json()
    for path in ("", "/ready", "/infer"):
        call = requests.post if path == "/infer" else requests.get
        other = call(f"{tiny_server.model}/versions/2{path}", timeout=30)
        assert (other.status_code, set(other.json())) == (404, {"error"})
        assert "the version that answers is 1" in other.json()["error"]


@pytest.mark.parametrize("data", [[0.5, -1, 2, 3, 4, 5, 6, 7], [[0.5, -1, 2, 3], [4, 5, 6, 7]]])
def test_an_answer_to_flat_and_nested_data(tiny_server: Server, data: Any) -> None:
    got = tiny_server.infer({"id": "a1", "inputs": [tensor(shape=[2, 4], data=data)]})
    assert got.status_code == 200
    assert got.json() == {
        "model_name": "model",
        "model_version": "1",
        "id": "a1",
        "outputs": [
            {"name": "output", "datatype": "FP32", "shape": [2, 3], "data": [0.5, -1, 2, 4, 5, 6]}
        ],
    }


def test_several_inputs_in_any_order(two_server: Server) -> None:
    plus = {"name": "plus", "shape": [2, 2], "datatype": "FP32", "data": [1, 1, 0, 0]}
    row = {"name": "row", "shape": [2], "datatype": "INT64", "data": [1, 4]}
    got = two_server.infer({"inputs": [plus, row]}).json()
    assert got["outputs"][0]["data"] == [3, 4, 8, 9]


def test_binary_data_both_ways(tiny_server: Server) -> None:
    rows = np.arange(8, dtype="<f4").reshape(2, 4)
    size = {"binary_data_size": rows.nbytes}
    asked = {
        "inputs": [tensor(shape=[2, 4], data=..., parameters=size)],
        "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(asked).encode()
    got = tiny_server.infer(head + rows.tobytes(), **{HEADER: str(len(head))})
    assert got.status_code == 200, got.text
    length = int(got.headers[HEADER])
    (output,) = json.loads(got.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 24}
    values = np.frombuffer(got.content[length:], "<f4").reshape(output["shape"])
    np.testing.assert_array_equal(values, rows[:, :3])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (b"", "the body must be JSON"),
        (b"[1, 2", "the body must be JSON"),
        (b"\xff\xfe", "the body must be JSON"),
        (b"[" * 9000, "the body must be JSON"),
        (b'{"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [NaN, 0, 0, '
         b'0]}]}', "finite numbers"),
        ([1], "the body must be a JSON object"),
        ({}, "inputs must be a list"),
        ({"inputs": []}, "every input must be given, but input is missing"),
        ({"inputs": [tensor()], "input": 1}, "unknown key 'input'; did you mean 'inputs'"),
        ({"inputs": [tensor()], "id": 7}, "id must be a string"),
        ({"inputs": [tensor(name="inputt")]}, "got 'inputt'; did you mean 'input'"),
        ({"inputs": [tensor(name=[])]}, "must be one of the model's"),
        ({"inputs": [tensor(), tensor()]}, "given twice"),
        ({"inputs": [tensor(datatype="FP64")]}, "datatype must be FP32 .* convert"),
        ({"inputs": [tensor(shape=[1, 5])]}, r"shape must be \[-1, 4\] .* got \[1, 5\]"),
        ({"inputs": [tensor(shape=[0, 4], data=[])]}, "any size from 1"),
        ({"inputs": [tensor(shape=[True, 4])]}, "shape must be"),
        ({"inputs": [tensor(shape=[10**30, 4])]}, "must hold 4"),
        ({"inputs": [tensor(data=[1, 2, 3])]}, r"must hold 4 values .* has shape \[3\]"),
        ({"inputs": [tensor(data=[[1, 2], [3, 4]])]}, r"has shape \[2, 2\]"),
        ({"inputs": [tensor(data=[[1, 2, 3], [4]])]}, "flat, or nested"),
        ({"inputs": [tensor(data=["1", 2, 3, 4])]}, "must be numbers for FP32, but holds '1'"),
        ({"inputs": [tensor(data=[None, 2, 3, 4])]}, "must be numbers for FP32, but holds None"),
        ({"inputs": [tensor(data=[1e300, 2, 3, 4])]}, "finite numbers that FP32 can hold"),
        ({"inputs": [tensor(data=[10**400, 2, 3, 4])]}, "must be numbers|finite"),
        ({"inputs": [tensor(data=...)]}, "data must be a list"),
        ({"inputs": [tensor(data=..., parameters={"binary_data_size": 16})]}, "with 0 bytes left"),
        ({"inputs": [tensor()], "outputs": [{"name": "out"}]}, "did you mean 'output'"),
        ({"inputs": [tensor(data=[3e38, 3e38, 1, 1])]}, None),
    ],
)  # fmt: skip
def test_bad_requests_get_the_rule_the_value_and_the_fix(
    tiny_server: Server, asked: Any, message: str | None
) -> None:
    got = tiny_server.infer(asked)
    if message is None:  # large, but legal
        assert got.status_code == 200
        return
    assert got.status_code == 400, got.text
    assert set(got.json()) == {"error"}
    assert re.search(message, got.json()["error"]), got.json()["error"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.5], "whole numbers for INT64, but holds 1.5"),
        ([True], "whole numbers"),
        ([2**63], "must lie in"),
        ([2**70], "whole numbers for INT64"),
        ([9], "the model cannot take these values"),
    ],
)
def test_integers_are_integers_and_the_model_may_refuse_them(
    two_server: Server, row: list[Any], message: str
) -> None:
    plus = {"name": "plus", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]}
    got = two_server.infer(
        {"inputs": [{"name": "row", "shape": [1], "datatype": "INT64", "data": row}, plus]}
    )
    assert got.status_code == 400
    assert message in got.json()["error"]
    rows = {"name": "row", "shape": [2], "datatype": "INT64", "data": [1, 2]}
    got = two_server.infer({"inputs": [rows, plus]})
    assert "as many rows, but got {'row': 2, 'plus': 1}" in got.json()["error"]


def test_answers_that_json_cannot_hold_can_be_had_as_binary_data(tmp_path: Path) -> None:
    with over_http(tiny(3e38), tmp_path) as server:
        asked: dict[str, Any] = {"inputs": [tensor(data=[1e10, 0, 0, 0])]}
        got = server.infer(asked)
        assert got.status_code == 400
        assert "an answer in JSON must be finite" in got.json()["error"]
        got = server.infer(asked | {"parameters": {"binary_data_output": True}})
        values = np.frombuffer(got.content[int(got.headers[HEADER]) :], "<f4")
        assert np.isinf(values[0])


def test_long_bodies_and_other_paths_are_refused_in_the_same_form(tiny_server: Server) -> None:
    got = tiny_server.infer(b" " * 10_001)
    assert got.status_code == 413
    assert "at most 10000 bytes" in got.json()["error"]
    chunks = iter([b" " * 6_000, b" " * 6_000])  # without a Content-Length
    got = requests.post(f"{tiny_server.model}/infer", data=chunks, timeout=30)
    assert got.status_code == 413
    got = tiny_server.get("/v2/models/other")
    assert (got.status_code, set(got.json())) == (404, {"error"})
    assert tiny_server.get("/v2/models/model/infer").status_code == 405
    assert tiny_server.infer({}, **{"content-encoding": "gzip"}).status_code == 415
    bad = tiny_server.infer({"inputs": []}, **{HEADER: "0" * 5000})
    assert "must be the length of the JSON" in bad.json()["error"]


def test_the_description_is_valid_and_its_example_is_answered(tiny_server: Server) -> None:
    described = tiny_server.get("/openapi.json").json()
    asked = described["paths"]["/v2/models/model/infer"]["post"]["requestBody"]
    example = asked["content"]["application/json"]["schema"]["example"]
    assert tiny_server.infer(example).json()["outputs"][0]["data"] == [0, 0, 0]


# ---------------------------------------------------------------- Ray Serve, as a user starts it


class Command:
    """``flyweight serve`` in a process group of its own, as in a terminal."""

    def __init__(self, model: str, *options: str) -> None:
        port = free_port()
        self.server = Server(f"http://127.0.0.1:{port}")
        words = [sys.executable, "-m", "flyweight.search.cli", "serve", model]
        self.process = subprocess.Popen(
            [*words, "--port", str(port), *options],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait(self, words: str, seconds: float = 120) -> str:
        """The first line that holds ``words``."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in list(self.lines):
                if words in line:
                    return line
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)
        raise AssertionError(f"{words!r} was not said: {self.lines}")

    def interrupt(self) -> int:
        """Ctrl-C, which a terminal sends to the whole group; the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reader.join(10)


@contextlib.contextmanager
def serving(model: Path | str, *options: str) -> Iterator[Command]:
    command = Command(str(model), *options)
    try:
        yield command
    finally:
        command.end()


@pytest.mark.slow
def test_serve_answers_as_the_runtime_does_and_ctrl_c_loses_no_request(tmp_path: Path) -> None:
    folder = artifact(tmp_path, slow())
    session = make_runtime("onnxruntime", 1).load(slow())
    with serving(folder, "--name", "net", "--batch", "1") as command:
        assert DIGEST[:12] in command.wait("Ready:")
        url = f"{command.server.url}/v2/models/net"
        assert requests.get(url, timeout=30).json()["versions"] == [DIGEST[:12]]

        def ask(number: int) -> tuple[int, Any]:
            data = [number, 1, 0, 1]
            got = requests.post(f"{url}/infer", json={"inputs": [tensor(data=data)]}, timeout=60)
            return number, got.json()["outputs"][0]["data"]

        with ThreadPoolExecutor(4) as clients:
            answers = [clients.submit(ask, number) for number in range(4)]
            time.sleep(0.3)  # they are under way: the model takes tenths of a second for each
            code = command.interrupt()
            for answer in answers:
                number, data = answer.result()
                expected = session.run({"input": np.array([[number, 1, 0, 1]], np.float32)})
                np.testing.assert_array_equal(np.float32(data), expected[0])
        assert code == 0, command.lines
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=30)


def test_what_cannot_be_served_is_said_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from flyweight.search.cli import main

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MLflow itself sets

    folder = str(artifact(tmp_path, tiny()))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(main, ["serve", folder, "--port", port])
    assert done.exit_code == 2
    assert "cannot be listened on" in done.output
    done = CliRunner().invoke(main, ["serve", "net@champion"])
    assert done.exit_code == 2
    assert "--tracking-uri" in done.output
    done = CliRunner().invoke(main, ["serve", str(tmp_path / "none")])
    assert (done.exit_code, "no '" in done.output) == (2, True)
    done = CliRunner().invoke(main, ["serve", folder, "--name", "a/b"])
    assert done.exit_code == 2
    assert "go on with those and _.-, but got 'a/b'" in done.output


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["net@champion"], "net"),
        (["net@champion", "--name", "other"], "other"),
        (["_net@champion"], "model"),  # MLflow takes what can be no path
        (["n\N{LATIN SMALL LETTER E WITH ACUTE}t@champion"], "model"),
    ],
)
def test_the_name_of_an_alias_is_what_clients_call_the_model(
    monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
) -> None:
    from click.testing import CliRunner

    from flyweight.search import serve
    from flyweight.search.cli import main

    called: list[str] = []
    monkeypatch.setattr(serve, "serve", lambda _, options, **__: called.append(options.name))
    assert CliRunner().invoke(main, ["serve", *words]).exit_code == 0
    assert called == [name]


def register(uri: str, folder: Path, content: bytes, digest: str, alias: str = "champion") -> str:
    """A version of "net" that has the alias, as ``flyweight deploy`` registers it; its number."""
    from flyweight.search.choose import Artifact
    from flyweight.search.registries import open_registry

    artifact(folder, content, digest=digest, metric=90.0)
    (folder / "policy.json").write_text("{}")
    metrics = json.loads((folder / "metrics.json").read_text())
    path, policy = folder / "model.onnx", folder / "policy.json"
    chosen = Artifact(digest, content, path, policy, metrics, 0.1, "t.py:T", TARGET)
    return open_registry("net", alias, uri).register(chosen, None, "e").version


def test_a_version_that_has_no_room_beside_the_one_before_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flyweight.search import serve

    deployed: list[Any] = []
    monkeypatch.setattr(serve, "deploy", lambda source, _: deployed.append(source))
    old: Any = SimpleNamespace(io={}, threads=1)
    new: Any = SimpleNamespace(io={}, threads=2)
    assert serve._replace(old, new, serve.Options(), 3.0) is new
    with pytest.raises(BadInput, match="of 2 threads a replica, for which the 5 CPUs"):
        serve._replace(old, new, serve.Options(replicas=2), 5.0)  # Ray Serve would wait for ever
    assert deployed == [new]


@dataclass
class Load:
    """Clients that ask without end; what they were told, and how often it failed."""

    model: str
    failed: list[str]
    told: list[tuple[str, float]]

    def run(self, stop: threading.Event) -> None:
        asked = {"inputs": [tensor(data=[1, 0, 0, 0])]}
        with requests.Session() as session:
            while not stop.is_set():
                got = session.post(f"{self.model}/infer", json=asked, timeout=60)
                if got.status_code != 200:
                    self.failed.append(got.text)
                    continue
                answer = got.json()
                self.told.append((answer["model_version"], answer["outputs"][0]["data"][0]))


@pytest.mark.slow
def test_when_the_alias_moves_no_request_fails_and_a_bad_version_changes_nothing(
    tmp_path: Path,
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert register(uri, tmp_path / "a", tiny(1), "1" * 64) == "1"
    options = ("--tracking-uri", uri, "--poll-s", "0.5")
    with serving("net@champion", *options) as command, ThreadPoolExecutor(4) as clients:
        assert f"{command.server.url}/v2/models/net (version 1" in command.wait("Ready:")
        load, stop = Load(f"{command.server.url}/v2/models/net", [], []), threading.Event()
        running = [clients.submit(load.run, stop) for _ in range(4)]
        try:
            register(uri, tmp_path / "b", tiny(2), "2" * 64)
            command.wait("Version 2 serves now")
            register(uri, tmp_path / "c", broken(), "3" * 64)
            said = command.wait("Version 3 is refused, version 2 goes on")
            assert "Incompatible dimensions for matrix multiplication" in said
            register(uri, tmp_path / "d", two(), "4" * 64)  # a good one, with other inputs
            command.wait("Version 4 is refused, version 2 goes on: its inputs and outputs")
            register(uri, tmp_path / "e", tiny(5), "5" * 64, alias="next")
            (stored,) = (
                place
                for place in (tmp_path / "mlartifacts").rglob("model.onnx")
                if place.read_bytes() == tiny(5)
            )
            stored.write_bytes(tiny(6))  # behind the registry's back
            MlflowClient(uri).set_registered_model_alias("net", "champion", "5")
            command.wait("version 5 of net is not the file that was scored")
            MlflowClient(uri).set_registered_model_alias("net", "champion", "1")
            command.wait("Version 1 serves now")
            time.sleep(1)
        finally:
            stop.set()
        for client in running:
            client.result()
        assert command.interrupt() == 0, command.lines
    assert load.failed == []
    assert set(load.told) == {("1", 1.0), ("2", 2.0)}  # each version's own answer, never a mixture
    assert load.told[0] == ("1", 1.0)
    assert load.told[-1] == ("1", 1.0)


@pytest.mark.slow
def test_a_queue_that_is_full_refuses_and_metrics_count(tmp_path: Path) -> None:
    with serving(artifact(tmp_path, slow()), "--batch", "1", "--queue", "1") as command:
        command.wait("Ready:")
        with ThreadPoolExecutor(40) as clients:
            asked = {"inputs": [tensor()]}
            answers = list(clients.map(lambda _: command.server.infer(asked), range(40)))
        metrics = command.wait("Metrics for Prometheus:").split()[-1]
        until = time.monotonic() + 60  # Ray gathers them every few seconds
        while "serve_num_http_requests" not in requests.get(metrics, timeout=30).text:
            assert time.monotonic() < until
            time.sleep(1)
        command.process.terminate()  # as a service manager ends it
        assert command.process.wait(60) == 0, command.lines
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 503}


@pytest.mark.slow
@pytest.mark.parametrize("content", [tiny(), two()], ids=["one input", "two inputs"])
def test_no_made_up_request_makes_it_fail_or_hang(content: bytes, tmp_path: Path) -> None:
    """benchmarks/serving.py makes up 10,000 for a model on Ray Serve."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings, strategies

    with over_http(content, tmp_path, most_bytes=1_000_000) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        infer = schema["/v2/models/model/infer"]["POST"]
        modes = schemathesis.GenerationMode
        cases = [infer.as_strategy(generation_mode=m) for m in (modes.POSITIVE, modes.NEGATIVE)]
        told: dict[int, int] = {}

        @settings(
            max_examples=250, deadline=None, derandomize=True, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=strategies.one_of(cases))
        def check(case: Any) -> None:
            got = case.call(timeout=30)
            told[got.status_code] = told.get(got.status_code, 0) + 1
            assert got.status_code < 500, got.text
            assert got.status_code == 200 or set(got.json()) == {"error"}

        check()
        assert told[400] > 50, told
        assert server.infer(infer.definition.raw["requestBody"]["content"]["application/json"][
            "schema"]["example"]).status_code == 200  # fmt: skip
