"""The arrow between the rooms, what they import, and what they offer."""

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROW = ["spaces", "kernels", "compressors", "search"]  # each may import those before it
FILES = [path for room in ARROW for path in sorted((ROOT / room).glob("*.py"))]
VENDORS = {"ray", "optuna", "mlflow"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(relative level, dotted name) of every import in ``path``, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module
            else:
                yield from ((node.level, alias.name) for alias in node.names)


def vendors(path: Path) -> set[str]:
    return {name.split(".")[0] for level, name in imports(path) if level == 0}


def users(vendor: str) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in FILES if vendor in vendors(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_follow_the_arrow(path: Path) -> None:
    room = path.parent.name
    allowed = set(ARROW[: ARROW.index(room)])
    for level, name in imports(path):
        first = name.split(".")[0]
        if level == 0:
            # A plain import of a room would find another package of that name.
            assert first not in {*ARROW, "flyweight"}, f"{name}: import it relatively"
        elif level == 1:
            assert (path.parent / f"{first}.py").is_file(), f".{name}: no such file"
        else:
            assert level == 2, f"{name}: outside of the package"
            assert first in allowed, f"{room} must not import {first}"
            inner = name.split(".")[1:]
            assert not inner or (ROOT / first / f"{inner[0]}.py").is_file(), f"..{name}"


def test_no_file_needs_one_that_needs_it() -> None:
    """A circle of imports at the top of files fails whichever of them is imported first."""
    needs = {
        path: {
            path.parent / f"{node.module.split('.')[0]}.py"
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        }
        for path in FILES
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


def test_rooms_are_one_level_deep() -> None:
    for room in ARROW:
        deeper = [p for p in (ROOT / room).rglob("*.py") if p.parent != ROOT / room]
        assert deeper == [p for p in deeper if "templates" in p.parts]  # what `init` writes


@pytest.mark.parametrize("room", ARROW)
def test_every_public_name_is_there_and_the_room_says_what_it_is(room: str) -> None:
    module = importlib.import_module(f"flyweight.{room}")
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


PUBLIC = {
    "spaces": {
        "BadInput", "Blueprint", "Capabilities", "Distill", "FlyweightError", "Group",
        "Impossible", "Kernel", "Layer", "Network", "Op", "Parameter", "Policy", "Prune",
        "Quantize", "Settings", "Space", "Untraceable", "blueprint", "nearest", "trace",
    },
    "kernels": {
        "RUNTIMES", "Array", "Batch", "DeviceProfile", "Inputs", "KernelTime", "Known",
        "LatencyPredictor", "MeasuringProcess", "Runtime", "Session", "Signature",
        "SimulatedClock", "SimulatedRuntime", "Timed", "Timing", "disturbed",
        "make_runtime", "predictor_for", "signature", "time_sessions",
    },
}  # fmt: skip


@pytest.mark.parametrize("room", PUBLIC)
def test_the_public_names_are_these(room: str) -> None:
    assert set(importlib.import_module(f"flyweight.{room}").__all__) == PUBLIC[room]


@pytest.mark.parametrize("room", ["spaces", "kernels"])
def test_a_measuring_process_stays_small(room: str) -> None:
    heavy = sorted({"torch", "torch_pruning", "sklearn", "matplotlib", *VENDORS})
    code = f"import sys, flyweight.{room}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_each_room_knows_no_vendor_it_must_not_know() -> None:
    forbidden = {
        "spaces": VENDORS | {"onnx", "onnxruntime", "openvino"},
        "kernels": VENDORS | {"torch", "torch_pruning"},
        "compressors": VENDORS | {"onnxruntime", "openvino"},
        "search": {"torch_pruning", "openvino"},
    }
    for path in FILES:
        assert not vendors(path) & forbidden[path.parent.name], path


def test_optuna_is_imported_in_one_file() -> None:
    assert users("optuna") == {"search/proposals.py"}


def test_mlflow_and_ray_are_imported_in_few_files() -> None:
    for vendor, most in (("mlflow", 6), ("ray", 8)):
        assert all(name.startswith("search/") for name in users(vendor))
        assert len(users(vendor)) <= most, users(vendor)
