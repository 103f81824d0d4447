"""`flyweight measure`: a run made by hand, as if fetched from a search on another device."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from flyweight.kernels import MeasuringProcess, make_runtime
from flyweight.search.cli import main
from flyweight.search.deploy import deploy
from flyweight.search.measure import measure
from flyweight.search.record import FileRecord
from flyweight.search.store import write_request
from flyweight.spaces import BadInput, FlyweightError, Policy, Prune

WIDE, NARROW = (Policy(prune=Prune(width={"stem": w})) for w in (24, 8))
ELSEWHERE = "f" * 16


def model(layers: int) -> bytes:
    """``layers`` products of 256 x 256: the more of them, the longer it takes."""
    weight = np.eye(256, dtype=np.float32)
    names = ["input", *(f"x{i}" for i in range(layers - 1)), "output"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)],
        "made",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 256])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 256])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


@dataclass(frozen=True)
class Run:
    path: Path

    def result(self) -> dict[str, Any]:
        return json.loads((self.path / "result.json").read_text())  # type: ignore[no-any-return]

    def entries(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.path / "record.jsonl").read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["kind"] == kind]

    def append(self, entry: dict[str, Any]) -> None:
        record = FileRecord(self.path / "record.jsonl")
        record.append(entry)
        record.close()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two artifacts. The search took the slow one for the fast one, and could not measure."""
    path = tmp_path / "fetched"
    (path / "teacher").mkdir(parents=True)
    (path / "teacher" / "model.onnx").write_bytes(model(24))
    write_request(path, {"input": np.ones((4, 256), np.float32)})
    target = {
        "runtime": "onnxruntime", "threads": 1, "batch_size": 4, "fingerprint": ELSEWHERE
    }  # fmt: skip
    teacher = {
        "metric": 90.0, "metric_test": 89.0, "latency_ms": 1.0, "size_bytes": 999,
        "compressed_bytes": 900,
    }  # fmt: skip
    objective = {
        "speedup": 2.0, "latency_ms": None, "max_drop": 1.0, "size_bytes": None,
        "compressed_bytes": None,
    }  # fmt: skip
    head = {
        "flyweight": "0", "task": "task.py:Net", "seed": 0, "objective": objective,
        "target": target, "predicted_by": "profile", "teacher": teacher,
    }  # fmt: skip
    known = [{"kind": "search", "time": 1.0, "versions": {}, "search_id": "s", **head}]
    front = []
    figures = (WIDE, model(20), 0.1, 89.5), (NARROW, model(2), 0.2, 89.6)
    for number, (policy, content, predicted, metric) in enumerate(figures):
        place = path / "artifacts" / policy.digest
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        (place / "metrics.json").write_text(json.dumps({"sha256": sha256}))
        name = {"trial": number, "digest": policy.digest, "time": 2.0}
        figures_ = {
            "metric": metric, "loss": 1 - number / 10, "size_bytes": 9, "compressed_bytes": 9,
            "latency_ms": [predicted, predicted, predicted],
            "artifact": f"artifacts/{policy.digest}/model.onnx",
        }  # fmt: skip
        known += [
            {"kind": "begin", **name, "policy": policy.to_dict()},
            {"kind": "result", **name, "rung": "full", "policy": policy.to_dict(), **figures_},
            {"kind": "end", **name, "reason": "finished", "error": None},
        ]
        row = {**figures_, "digest": policy.digest, "metric_test": None}
        row |= {"latency_ms": predicted, "latency_spread": None, "predicted_latency_ms": [0, 0, 0]}
        front.append(row)
    result = {
        **head, "wall_s": 5.0, "trials": {"recalibrate": 2, "short": 2, "full": 2}, "front": front,
        "best": WIDE.digest, "nearest_miss": None, "mlflow_run_id": None,
    }  # fmt: skip
    (path / "result.json").write_text(json.dumps(result))
    found = Run(path)
    for entry in known:
        found.append(entry)
    return found


def test_what_is_measured_decides_and_the_new_device_is_named(run: Run) -> None:
    before = run.result()
    (run.path / "explain.json").write_text("")  # of what was the best
    done = CliRunner().invoke(main, ["measure", str(run.path), "--json"])
    assert done.exit_code == 0, done.output
    after = run.result()
    assert json.loads(done.stdout) == after
    here = make_runtime("onnxruntime", 1).fingerprint
    assert after["target"] == before["target"] | {"fingerprint": here}
    rows = {row["digest"]: row for row in after["front"]}
    assert after["best"] == NARROW.digest  # 12 times less work than the teacher
    assert list(rows) == [NARROW.digest]  # and better: it dominates the other
    row = rows[NARROW.digest]
    assert row["latency_spread"] is not None
    teacher_ms = after["teacher"]["latency_ms"]
    assert row["latency_ms"] < teacher_ms / 2
    # What was predicted: five times faster than the teacher, whatever that takes here.
    assert row["predicted_latency_ms"] == pytest.approx([0.2 * teacher_ms] * 3)
    same = ("wall_s", "trials", "task", "seed", "objective")
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    measured = run.entries("measured")
    assert {e["digest"] for e in measured} == {WIDE.digest, NARROW.digest}
    assert {e["fingerprint"] for e in measured} == {here}
    assert run.entries("search")[0]["target"]["fingerprint"] == ELSEWHERE
    assert not (run.path / "explain.json").exists()
    page = (run.path / "report.html").read_text()
    assert here in page
    assert ELSEWHERE not in page


def test_what_a_search_knew_of_the_test_set_stays(run: Run) -> None:
    run.append({
        "kind": "measured", "digest": NARROW.digest, "latency_ms": 0.3, "latency_spread": 0.0,
        "teacher_latency_ms": 1.0, "metric_test": 88.5, "fingerprint": ELSEWHERE, "time": 3.0,
    })  # fmt: skip
    assert measure(run.path).result["front"][0]["metric_test"] == 88.5
    assert measure(run.path).result["front"][0]["metric_test"] == 88.5  # and again


def test_finalists_are_those_of_the_target_that_was_searched_for_last(run: Run) -> None:
    """A search that went on for another target, where one of two is slow for all that it loses."""
    run.append({**run.entries("search")[0], "time": 3.0})
    for policy, ms in ((WIDE, 0.9), (NARROW, 0.2)):
        priced = {"kind": "priced", "digest": policy.digest, "latency_ms": [ms] * 3, "time": 3.0}
        run.append(priced | {"trial": [WIDE, NARROW].index(policy)})
    measure(run.path)
    assert {e["digest"] for e in run.entries("measured")} == {NARROW.digest}


def refused(run: Run, error: type[Exception], message: str) -> None:
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(error, match=message):
        measure(run.path)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_a_run_that_has_not_ended_is_refused_with_what_to_do(run: Run) -> None:
    run.append({"kind": "begin", "trial": 7, "digest": "d", "time": 3.0, "policy": {}})
    refused(run, BadInput, f"cut off.* --out {run.path} --resume")
    run.append({"kind": "end", "trial": 7, "digest": "d", "time": 4.0, "reason": "interrupted"})
    run.append({"kind": "again", "trial": 7, "digest": "d", "time": 5.0})  # and killed
    refused(run, BadInput, f"cut off.* --out {run.path} --resume")
    (run.path / "result.json").unlink()
    refused(run, BadInput, f"not the directory of a search that ended.* --out {run.path} --resume")


def test_a_run_that_is_in_use_is_refused(run: Run) -> None:
    record = FileRecord(run.path / "record.jsonl")
    try:
        refused(run, BadInput, "is being written")
    finally:
        record.close()


@pytest.mark.parametrize("name", ["record.jsonl", "teacher/request.npz", "teacher/model.onnx"])
def test_what_was_not_fetched_is_named(run: Run, name: str) -> None:
    (run.path / name).unlink()
    refused(run, (BadInput, OSError), Path(name).name)  # type: ignore[arg-type]  # either


def test_an_artifact_that_is_damaged_is_refused(run: Run) -> None:
    (run.path / "artifacts" / WIDE.digest / "model.onnx").write_bytes(model(1))
    refused(run, FlyweightError, "damaged")


def test_a_missing_artifact_is_left_out_and_told(run: Run) -> None:
    (run.path / "artifacts" / NARROW.digest / "model.onnx").unlink()
    found = measure(run.path)
    assert [row["digest"] for row in found.result["front"]] == [WIDE.digest]
    assert found.result["best"] is None  # 20 of 24 products: not twice as fast
    assert found.result["nearest_miss"] == WIDE.digest
    assert any("1 of 2 finalists" in note for note in found.notes)
    (run.path / "artifacts" / WIDE.digest / "model.onnx").unlink()
    with pytest.raises(BadInput, match="holds none of its finalists"):
        measure(run.path)


def test_ctrl_c_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("flyweight.search.meter.time_sessions", interrupted)
    refused(run, KeyboardInterrupt, "^$")  # type: ignore[arg-type]


def test_deploy_asks_where_the_task_of_a_fetched_run_is(run: Run, tmp_path: Path) -> None:
    spec = "task: /somewhere/else/task.py:Net\nobjective: {max_drop: 1}\n"
    (run.path / "spec.yaml").write_text(spec)
    with pytest.raises(BadInput, match=r"no file /somewhere/else/task.py; .* --spec"):
        deploy(run.path)
    (tmp_path / "task.py").write_text("class Other: ...\n")
    own = tmp_path / "search.yaml"
    own.write_text("task: task.py:Other\nobjective: {max_drop: 1}\n")
    with pytest.raises(BadInput, match=r"task is task.py:Other, but the run is of task.py:Net"):
        deploy(run.path, spec_path=own)


def test_a_finalist_that_the_runtime_refuses_is_left_out_and_told(run: Run) -> None:
    place = run.path / "artifacts" / NARROW.digest
    (place / "model.onnx").write_bytes(b"no model")
    sha256 = hashlib.sha256(b"no model").hexdigest()
    (place / "metrics.json").write_text(json.dumps({"sha256": sha256}))
    found = measure(run.path)
    assert [row["digest"] for row in found.result["front"]] == [WIDE.digest]
    told = f"The runtime here refuses {NARROW.digest[:12]}, or dies of it: left out"
    assert told in found.notes


def test_a_finalist_that_kills_the_runtime_costs_itself_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bears = MeasuringProcess.bears

    def dies(self: MeasuringProcess, models: Mapping[str, bytes]) -> dict[str, bytes]:
        return bears(self, {name: model for name, model in models.items() if name != NARROW.digest})

    monkeypatch.setattr(MeasuringProcess, "bears", dies)
    found = measure(run.path)
    assert [row["digest"] for row in found.result["front"]] == [WIDE.digest]
    assert any(NARROW.digest[:12] in note and "dies of it" in note for note in found.notes)
    assert {e["digest"] for e in run.entries("measured")} == {WIDE.digest}
