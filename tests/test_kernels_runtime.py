"""The contract of a runtime, held by the real ones and by their twin."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flyweight import kernels
from flyweight.kernels import SimulatedRuntime, make_runtime, time_sessions
from flyweight.kernels.cores import cores
from flyweight.kernels.onnxruntime import OnnxRuntime
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


def looked_up():
    """output = table[word] - input, a request being a vector and a word; batch dynamic."""
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "word"], ["row"]),
            helper.make_node("Sub", ["row", "input"], ["output"]),
        ],
        "looked_up",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, ("batch", 2)),
            helper.make_tensor_value_info("word", TensorProto.INT64, ("batch",)),
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ("batch", 2))],
        [numpy_helper.from_array(WEIGHT, "table")],
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
        for batch in (1, 5, 300, 1, 20):
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

    def test_an_answer_belongs_to_the_caller(self):
        session = self.make().load(linear())
        first = session.run({"input": np.ones((1, 3), np.float32)})
        session.run({"input": np.zeros((1, 3), np.float32)})
        np.testing.assert_array_equal(first, WEIGHT.sum(0, keepdims=True))

    def test_inputs_come_by_name_in_any_order(self):
        session = self.make().load(looked_up())
        for batch in (1, 3):
            rows, words = np.full((batch, 2), 0.5, np.float32), np.arange(batch)
            for inputs in ({"input": rows, "word": words}, {"word": words, "input": rows}):
                np.testing.assert_allclose(session.run(inputs), WEIGHT[words] - 0.5)

    def test_inputs_by_other_names_are_impossible(self):
        inputs = {"input": np.ones((1, 2), np.float32), "word": np.array([1])}
        session = self.make().load(looked_up())
        session.run(inputs)
        for wrong in ({"input": inputs["input"]}, {"input": inputs["input"], "words": np.ones(1)}):
            with pytest.raises(Impossible, match="run"):
                session.run(wrong)
        np.testing.assert_allclose(session.run(inputs), WEIGHT[[1]] - 1)  # it goes on

    def test_float_is_computed_in_float32(self):
        generator = np.random.default_rng(0)
        weight = generator.standard_normal((256, 32)).astype(np.float32)
        model = onnx.load_from_string(linear())
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 256
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 32
        session = self.make().load(model.SerializeToString())
        for batch in (1, 64):
            rows = generator.standard_normal((batch, 256)).astype(np.float32)
            exact = rows.astype(np.float64) @ weight
            # of bfloat16 the error is a hundred times as large
            np.testing.assert_allclose(session.run({"input": rows}), exact, atol=1e-4)

    @pytest.mark.parametrize("content", [b"", b"not a model", linear(("a", "b"))])
    def test_a_model_that_does_not_load_is_impossible(self, content):
        with pytest.raises(Impossible):
            self.make().load(content)

    def test_an_absent_file_is_impossible(self, tmp_path):
        with pytest.raises(Impossible, match="load"):
            self.make().load(tmp_path / "absent.onnx")

    @pytest.mark.parametrize("shape", [(1, 4), (300, 4), (1, 3, 3, 4)])
    def test_inputs_that_do_not_fit_are_impossible(self, shape):
        session = self.make().load(linear())
        with pytest.raises(Impossible, match="run"):
            session.run({"input": np.ones(shape, np.float32)})

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
        assert capabilities.int8_ops == {"add", "pool", "avgpool"}


class TestOpenVino(RuntimeContract):
    def make(self, threads=1):
        return make_runtime("openvino", threads)

    def test_errors_reach_the_caller_and_not_the_terminal(self, capfd):
        with pytest.raises(Impossible, match="read the model"):
            self.make().load(b"not a model")
        with pytest.raises(Impossible, match="shape"):
            self.make().load(linear()).run({"input": np.ones((1, 4), np.float32)})
        assert capfd.readouterr() == ("", "")

    def test_capabilities(self):
        capabilities = self.make().capabilities
        assert capabilities.precisions == {"conv": ("fp32", "int8"), "linear": ("fp32", "int8")}
        assert capabilities.width_multiple == 8
        assert capabilities.output_quantized == capabilities.act_output_quantized == set()
        assert capabilities.int8_ops == set()

    def test_its_settings_are_kept(self):
        from flyweight.kernels.openvino import ov, settings

        core, asked = ov.Core(), settings(1)
        compiled = core.compile_model(core.read_model(linear()), "CPU", asked)
        del asked["ENABLE_HYPER_THREADING"]  # False again on a CPU that has none
        for name, wanted in asked.items():
            found = compiled.get_property(name)
            assert found == (ov.Type.f32 if name == "INFERENCE_PRECISION_HINT" else wanted), name

    def test_without_the_package_it_is_refused(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "openvino", None)
        monkeypatch.delitem(sys.modules, "flyweight.kernels.openvino", raising=False)
        with pytest.raises(BadInput, match=r"pip install -c constraints.txt -e '.\[openvino\]'"):
            make_runtime("openvino", 1)


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
    with pytest.raises(BadInput, match=f"threads={threads}, cores={cores()}"):
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


def test_a_measuring_process_stays_free_of_torch_and_of_what_it_does_not_measure():
    wanted = "sys.exit(not {'torch', 'openvino'}.isdisjoint(sys.modules))"
    code = f"import sys, flyweight.kernels; {wanted}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
