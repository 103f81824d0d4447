"""Timing in a process of its own: what a model does to it stays there."""

import os
import signal

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
