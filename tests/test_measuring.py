"""Timing in a process of its own: what a model does to it stays there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flyweight.kernels import MeasuringProcess
from flyweight.kernels.probe import CHANNELS, probe_model
from flyweight.kernels.timing import TEACHER
from flyweight.spaces import FlyweightError

TEACHER_MODEL = probe_model("conv", 3)[0].SerializeToString()
OTHER = probe_model("conv", 5)[0].SerializeToString()
INPUTS = {"input": np.ones((1, CHANNELS, 3, 3), np.float32)}


def test_models_are_timed_beside_the_teacher_and_one_that_cannot_run_is_none() -> None:
    with MeasuringProcess("onnxruntime", 1, TEACHER_MODEL, INPUTS) as process:
        found = process.time({"good": OTHER, "bad": b"no model"})
        assert found.keys() == {TEACHER, "good", "bad"}
        assert found["bad"] is None
        for name in (TEACHER, "good"):
            timing = found[name]
            assert timing is not None
            assert timing.median_ms > 0


def test_a_process_that_died_is_begun_anew_and_nothing_is_lost() -> None:
    with MeasuringProcess("onnxruntime", 1, TEACHER_MODEL, INPUTS) as process:
        first = process.pid
        os.kill(first, signal.SIGKILL)  # as a kernel with a fault would
        found = process.time({"a": TEACHER_MODEL, "b": OTHER})
        assert all(found[name] is not None for name in (TEACHER, "a", "b"))
        assert process.bears({"a": OTHER, "bad": b"no model"}) == {"a": OTHER}
        assert process.pid != first


def test_a_process_that_dies_at_once_is_said_and_not_waited_for() -> None:
    large = TEACHER_MODEL + bytes(1_000_000)  # more than a pipe holds; and no model
    with (
        MeasuringProcess("no such runtime", 1, large, INPUTS) as process,
        pytest.raises(FlyweightError, match="teacher's model"),
    ):
        process.time({"a": OTHER})


def test_nothing_is_left_of_it() -> None:
    with MeasuringProcess("onnxruntime", 1, TEACHER_MODEL, INPUTS) as process:
        process.time({})
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_teacher_that_does_not_load_is_said() -> None:
    with (
        MeasuringProcess("onnxruntime", 1, b"no model", INPUTS) as process,
        pytest.raises(FlyweightError, match="teacher's model"),
    ):
        process.time({"a": OTHER})


SCRIPT = """
import sys
import numpy as np
from flyweight.kernels import MeasuringProcess
print("begun")
teacher = open(sys.argv[1], "rb").read()
with MeasuringProcess("onnxruntime", 1, teacher, dict(np.load(sys.argv[2]))) as process:
    print(*process.time({}))
"""


def script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``code`` run as a user's script, with the files of a teacher and its inputs."""
    (folder / "script.py").write_text(code)
    (folder / "teacher.onnx").write_bytes(TEACHER_MODEL)
    np.savez(folder / "inputs.npz", **INPUTS)
    command = [sys.executable, "script.py", "teacher.onnx", "inputs.npz"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_script_without_a_guard_is_not_run_anew(tmp_path: Path) -> None:
    done = script(SCRIPT, tmp_path)
    assert done.stdout.split() == ["begun", TEACHER], done.stderr


HANGS = """
import os, signal, sys
import numpy as np
from flyweight.kernels import MeasuringProcess
teacher = open(sys.argv[1], "rb").read()
process = MeasuringProcess("onnxruntime", 1, teacher, dict(np.load(sys.argv[2]))).__enter__()
process.time({})
os.kill(process.pid, signal.SIGSTOP)  # it does not see that the pipe is closed
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nothing else ends a process with its parent")
def test_what_hangs_does_not_outlive_who_asked(tmp_path: Path) -> None:
    pid = int(script(HANGS, tmp_path).stdout)
    ends = time.monotonic() + 60
    while time.monotonic() < ends and alive(pid):
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
