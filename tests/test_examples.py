"""The examples: their data, their teachers, and the article's steps from top to bottom."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from executed import float_layers, int8_layers, optimized_kernels

from flyweight.compressors import Schedule, compress, load_task, prepare
from flyweight.compressors.parity import run_module
from flyweight.kernels import make_runtime
from flyweight.spaces import Capabilities, Policy, Settings, Space


@pytest.fixture(scope="module")
def har(root: Path) -> Iterator[Any]:
    """The task of examples/har, whose modules must not stay behind for other tests."""
    if not (root / "examples" / "har" / "data" / "hapt.npz").exists():
        pytest.skip("the data is not in the repository: examples/har/make_data.py writes it")
    before, path = set(sys.modules), list(sys.path)
    yield load_task("task.py:Activities", root / "examples" / "har", {})
    sys.path[:] = path
    for name in set(sys.modules) & {"task", "windows", "network"} - before:
        del sys.modules[name]


def test_no_subject_is_in_two_parts(har: Any) -> None:
    subjects = sys.modules["windows"].SUBJECTS
    assert sorted(s for part in subjects.values() for s in part) == list(range(1, 31))
    assert [len(har.train), len(har.val), len(har.test)] == [6326, 2111, 3447]
    window, activity = har.val[0]
    assert window.shape == (6, 128)
    assert 0 <= activity < 12
    gravity = [np.linalg.norm(har.val[i][0][:3].mean(1)) for i in range(0, 2000, 50)]
    assert 0.9 < np.median(gravity) < 1.1  # accelerations are in g


def test_the_teacher_scores_what_its_file_says(har: Any, root: Path) -> None:
    said = json.loads((root / "examples" / "har" / "teacher.json").read_text())
    ready = prepare(har, make_runtime("onnxruntime", 1), Schedule())
    model = har.model()
    assert sum(p.numel() for p in model.parameters()) == said["parameters"]
    answers = run_module(model.eval(), ready.splits.test)
    assert har.metric(answers, ready.splits.test.targets) == pytest.approx(said["test"], abs=0.05)


def test_one_dimensional_convolutions_run_in_int8(har: Any) -> None:
    runtime = make_runtime("onnxruntime", 1)
    ready = prepare(har, runtime, Schedule())
    space = Space(ready.network, runtime.capabilities, Settings(min_keep=0.25))
    uniform = space.uniform(0.5, "int8")
    found = compress(ready, Policy(uniform.prune, uniform.quantize), "full")
    assert (int8_layers(found.model), float_layers(found.model)) == (16, 0)
    assert optimized_kernels(found.model)["QLinearConv"] == 15
    assert found.parity is not None
    assert found.parity.agreement >= 0.995


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"flyweight_example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recordings_are_read_without_running_what_a_pickle_says(root: Path) -> None:
    import io
    import pickle

    reader = load(root / "examples" / "har" / "make_data.py").Reader

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("boo",)

    for value in (Evil(), np.float64(1), Capabilities({"conv": ("fp32",)})):
        with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
            reader(io.BytesIO(pickle.dumps(value)), fix_imports=False).load()
    assert reader(io.BytesIO(pickle.dumps({1: [2.5, "a"]}))).load() == {1: [2.5, "a"]}


@pytest.mark.slow
def test_the_steps_of_the_article(root: Path) -> None:
    article = load(root / "examples" / "article_cnn" / "article.py")
    rows = {row["step"]: row for row in article.main(2_000, 2, 1.0)}
    teacher = rows["the teacher"]
    assert teacher["accuracy"] > 60
    masked = rows["1 wrong: random mask on half of the weights"]
    pruned = rows["1 right: half of the channels, by importance"]
    divided, int8 = rows["3 wrong: integer division"], rows["3 right: static int8"]
    together = rows["1 + 2 + 3 right"]
    # The wrong steps gain nothing; what is right is smaller by as much as it says.
    for wrong in (masked, divided):
        assert wrong["size_kb"] == pytest.approx(teacher["size_kb"], rel=0.01)
    assert pruned["size_kb"] < 0.3 * teacher["size_kb"]
    assert int8["size_kb"] < 0.3 * teacher["size_kb"]
    assert together["size_kb"] < 0.3 * pruned["size_kb"]
    assert pruned["accuracy"] > masked["accuracy"]
    assert int8["accuracy"] > teacher["accuracy"] - 2
    assert together["accuracy"] > teacher["accuracy"] - 10
