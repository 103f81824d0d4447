"""The device: CPU flags, fingerprint, and the weight bits that its kernels bear."""

import os
import platform
import subprocess
import sys

import numpy as np
import onnx
import pytest
from executed import float_layers, int8_layers
from hypothesis import given
from hypothesis import strategies as st

from flyweight.kernels import SimulatedRuntime, device, make_runtime
from flyweight.kernels.device import brand, cpu, describe, fingerprint_of, parse_cpuinfo
from flyweight.kernels.device import weight_bits_by_flags as by_flags
from flyweight.kernels.probe import measured_weight_bits, probe_model
from flyweight.spaces.errors import Impossible

REAL = ["onnxruntime", "openvino"]
X86_64 = {"x86_64", "AMD64"}
X86 = """processor\t: 0
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
stepping\t: 1
microcode\t: 1
flags\t\t: fpu sse avx2 fma

processor\t: 1
model name\t: another
flags\t\t: fpu avx512_vnni
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0c
"""


def test_cpuinfo_of_x86_and_arm():
    flags = {"fpu", "sse", "avx2", "fma"}
    assert parse_cpuinfo(X86) == ("AMD EPYC", flags, "cpu family 25 model 1 stepping 1")
    flags = {"fp", "asimd", "asimddp"}
    assert parse_cpuinfo(ARM) == ("0xd0c", flags, "cpu implementer 0x41 cpu part 0xd0c")
    assert parse_cpuinfo("") == ("", frozenset(), "")


def test_generations_of_one_name_are_two_devices(tmp_path, monkeypatch):
    """Virtual machines call every AMD EPYC that; ARM boards do not say a name at all."""

    def found(cpuinfo, board=None):
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        if board:
            (tmp_path / "model").write_text(f"{board}\0")
        paths = {"/proc/cpuinfo": "cpuinfo", "/proc/device-tree/model": "model"}
        monkeypatch.setattr(device, "Path", lambda path: tmp_path / paths[path])
        return fingerprint_of(describe("onnxruntime", "1.0", 1))

    next_one = X86.replace("cpu family\t: 25", "cpu family\t: 26")
    of = [found(X86), found(next_one), found(ARM), found(ARM, "Pi 4"), found(ARM, "Pi 5")]
    assert len({*of}) == 5
    assert found(X86.replace("microcode\t: 1", "microcode\t: 2"), "Pi 4") == found(X86, "Pi 4")


def test_macos_says_which_cpu_it_has(tmp_path, monkeypatch):
    """In a shell script that stands for its sysctl."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert brand() == ""
    script = tmp_path / "sysctl"
    script.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo "Apple M2"\n')
    script.chmod(0o755)
    assert brand() == "Apple M2"


@given(st.text())
def test_any_cpuinfo_is_read(text):
    parse_cpuinfo(text)


@pytest.mark.parametrize(
    ("flags", "arch", "bits"),
    [
        ({"avx2"}, "x86_64", 7),
        ({"avx2", "avx512f"}, "AMD64", 7),
        ({"avx2", "avx_vnni"}, "x86_64", 8),
        ({"avx512f", "avx512_vnni"}, "x86_64", 8),
        (set(), "x86_64", 7),  # unknown flags: the careful answer
        ({"asimddp"}, "aarch64", 8),
        (set(), "arm64", 8),
    ],
)
def test_x86_without_vnni_saturates(flags, arch, bits):
    assert by_flags(flags, arch) == bits


def test_the_fingerprint_depends_on_facts_and_not_on_their_order():
    facts = describe("onnxruntime", "1.0", 1)
    assert fingerprint_of(facts) == fingerprint_of(dict(reversed(facts.items())))
    for key in facts:
        assert fingerprint_of({**facts, key: "other"}) != fingerprint_of(facts)
    assert fingerprint_of({"a": "b"}) == "db4a7ecb114bc66c"


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("weight", [127, -127, 64, -64, 63])
def test_the_probe_runs_in_int8_and_its_exact_output_is_right(name, kind, weight):
    model, exact = probe_model(kind, weight)
    onnx.checker.check_model(model)
    content, runtime = model.SerializeToString(), make_runtime(name, 1)
    assert (int8_layers(content, runtime), float_layers(content, runtime)) == (1, 0)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    inputs = {"input": np.full(shape, 255, np.float32)}
    reference = SimulatedRuntime().load(content).run(inputs)
    np.testing.assert_allclose(reference, exact, rtol=1e-6)
    if abs(weight) <= 64:
        np.testing.assert_allclose(runtime.load(content).run(inputs), exact, rtol=1e-6)


@pytest.mark.parametrize("name", REAL)
def test_probe_and_flags_agree_on_this_machine(name):
    runtime = make_runtime(name, 1)
    assert measured_weight_bits(runtime) == by_flags(cpu()[1], platform.machine())
    assert runtime.capabilities.weight_bits == measured_weight_bits(runtime)


def test_openvino_with_the_kernels_of_another_processor_is_another_device(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    own = make_runtime("openvino", 1)
    assert "isa" not in own.device
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    other = make_runtime("openvino", 1)
    assert other.device == {**own.device, "isa": "AVX2"}
    assert other.fingerprint != own.fingerprint


@pytest.mark.skipif(platform.machine() not in X86_64, reason="these kernels are of x86")
def test_openvino_bears_seven_bits_without_vnni():
    code = (
        "from flyweight.kernels import make_runtime as make;"
        "print(make('openvino', 1).capabilities.weight_bits)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "7"


def test_exact_kernels_bear_eight_bits():
    assert measured_weight_bits(SimulatedRuntime(threads=3)) == 8


class Saturating(SimulatedRuntime):
    """Kernels that saturate as those of x86 without VNNI: the exact sum is capped per pair."""

    name = "saturating"
    cap = 2**15 - 1

    def load(self, model):
        session = super().load(model)
        weights = {w.name: w for w in onnx.load_from_string(model).graph.initializer}
        weight = onnx.numpy_helper.to_array(weights["weight"]).astype(np.int64)
        pair = 2 * 255 * int(weight.flat[0])
        share = np.clip(pair, -self.cap - 1, self.cap) / pair
        exact = session.answer
        session.answer = lambda inputs: exact(inputs) * share
        return session


def test_saturating_kernels_bear_seven():
    assert measured_weight_bits(Saturating(threads=3)) == 7


def test_narrower_kernels_bear_less():
    narrow = Saturating(threads=4)
    narrow.cap = 2**14 - 1
    assert measured_weight_bits(narrow) == 6


def test_flags_decide_where_the_probe_cannot_run():
    class Broken(SimulatedRuntime):
        name = "broken"

        def load(self, model):
            raise Impossible(f"no such operation in {len(model)} bytes")

    assert measured_weight_bits(Broken()) == by_flags(cpu()[1], platform.machine())


def test_the_probe_runs_once_a_process():
    class Counting(SimulatedRuntime):
        name = "counting"
        loads = 0

        def load(self, model):
            type(self).loads += 1
            return super().load(model)

    assert measured_weight_bits(Counting()) == measured_weight_bits(Counting()) == 8
    assert Counting.loads == 4  # two kinds, two ends
