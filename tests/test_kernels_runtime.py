"""The contract of a runtime, held by the real one and by its twin."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flyweight import kernels
from flyweight.kernels import OnnxRuntime, SimulatedRuntime, make_runtime, time_sessions
from flyweight.spaces.errors import BadInput, Impossible

WEIGHT = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)


def linear(outputs=("output",)):
    """output = input @ WEIGHT, batch dynamic, repeated for every name in outputs."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], [name]) for name in outputs],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ("batch", 3))],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("batch", 2)) for n in outputs],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


class RuntimeContract:
    """What search relies on. A subclass says how to make the runtime."""

    def make(self, threads=1):
        raise NotImplementedError

    def test_it_answers_for_any_batch(self):
        session = self.make().load(linear())
        for batch in (1, 5):
            inputs = {"input": np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)}
            output = session.run(inputs)
            np.testing.assert_allclose(output, inputs["input"] @ WEIGHT, rtol=1e-6)
            assert output.dtype == np.float32

    def test_a_file_and_its_content_are_the_same_model(self, tmp_path):
        path = tmp_path / "model.onnx"
        path.write_bytes(linear())
        inputs = {"input": np.ones((2, 3), np.float32)}
        runtime = self.make()
        np.testing.assert_array_equal(
            runtime.load(path).run(inputs), runtime.load(linear()).run(inputs)
        )

    def test_inputs_are_left_alone_and_answers_repeat(self):
        session, inputs = self.make().load(linear()), {"input": np.ones((1, 3), np.float32)}
        first = session.run(inputs).copy()
        np.testing.assert_array_equal(session.run(inputs), first)
        np.testing.assert_array_equal(inputs["input"], np.ones((1, 3)))

    @pytest.mark.parametrize("content", [b"", b"not a model", linear(("a", "b"))])
    def test_a_model_that_does_not_load_is_impossible(self, content):
        with pytest.raises(Impossible):
            self.make().load(content)

    def test_an_absent_file_is_impossible(self, tmp_path):
        with pytest.raises(Impossible, match="load"):
            self.make().load(tmp_path / "absent.onnx")

    def test_inputs_that_do_not_fit_are_impossible(self):
        session = self.make().load(linear())
        with pytest.raises(Impossible, match="run"):
            session.run({"input": np.ones((1, 4), np.float32)})

    def test_the_fingerprint_is_stable_and_knows_the_threads(self):
        assert self.make().fingerprint == self.make().fingerprint
        assert self.make(threads=1).fingerprint != self.make(threads=2).fingerprint
        assert len(self.make().fingerprint) == 16
        assert int(self.make().fingerprint, 16) >= 0

    def test_the_device_is_told_in_words(self):
        device = self.make(threads=2).device
        assert device["threads"] == "2"
        assert device["runtime"] == self.make().name
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in device.items())

    def test_capabilities_begin_with_float(self):
        capabilities = self.make().capabilities
        assert set(capabilities.precisions) == {"conv", "linear"}
        assert capabilities == self.make().capabilities

    def test_it_can_be_timed(self):
        runtime = self.make()
        inputs = {"input": np.ones((1, 3), np.float32)}
        sessions = {name: runtime.load(linear()) for name in ("teacher", "small")}
        timings = time_sessions(sessions, inputs, rounds=2, repeats=3)
        assert [len(timing.rounds_ms) for timing in timings.values()] == [2, 2]


class TestOnnxRuntime(RuntimeContract):
    def make(self, threads=1):
        return OnnxRuntime(threads)

    def test_errors_reach_the_caller_and_not_the_terminal(self, capfd):
        with pytest.raises(Impossible, match="protobuf"):
            self.make().load(b"not a model")
        with pytest.raises(Impossible):
            self.make().load(linear()).run({"input": np.ones((1, 4), np.float32)})
        assert capfd.readouterr() == ("", "")

    def test_capabilities(self):
        capabilities = self.make().capabilities
        assert capabilities.precisions == {"conv": ("fp32", "int8"), "linear": ("fp32", "int8")}
        assert capabilities.width_multiple == 8
        assert capabilities.output_quantized == {"conv"}
        assert capabilities.int8_ops == {"add"}


class TestSimulatedRuntime(RuntimeContract):
    def make(self, threads=1):
        return SimulatedRuntime(threads=threads)

    def test_time_passes_as_given(self):
        runtime = SimulatedRuntime(lambda content: (len(content) / 100,))
        content, inputs = linear(), {"input": np.ones((1, 3), np.float32)}
        runtime.load(content).run(inputs)
        assert runtime.clock() == pytest.approx(len(content) * 1e4)


def test_runtimes_are_made_by_name():
    runtime = make_runtime("onnxruntime", 1)
    assert (runtime.name, runtime.threads) == ("onnxruntime", 1)


def test_an_unknown_runtime_names_the_nearest():
    with pytest.raises(BadInput, match=r"'onnxruntim'; did you mean 'onnxruntime'\?"):
        make_runtime("onnxruntim", 1)


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_that_this_machine_lacks_are_refused(threads):
    with pytest.raises(BadInput, match=f"threads={threads}, cores={os.cpu_count()}"):
        make_runtime("onnxruntime", threads)


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("onnxruntime-cuda", "CUDAExecutionProvider"),
        ("onnxruntime-tensorrt", "TensorrtExecutionProvider"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(name, provider):
    import onnxruntime

    if provider in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(BadInput, match=r"CPUExecutionProvider.*onnxruntime-gpu") as error:
        make_runtime(name, 1)
    assert provider in str(error.value)


def test_public_names_exist():
    assert len(set(kernels.__all__)) == len(kernels.__all__)
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_a_measuring_process_stays_free_of_torch():
    code = "import sys, flyweight.kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
