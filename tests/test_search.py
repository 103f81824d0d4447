"""Whole searches through the command line, on the starter task of ``flyweight init``."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow  # each starts a local Ray and trains

KEYS = {
    "flyweight", "task", "seed", "wall_s", "objective", "trials", "target", "teacher", "front",
    "best", "nearest_miss", "mlflow_run_id",
}  # fmt: skip
ROW = {
    "digest", "metric", "metric_test", "latency_ms", "latency_spread", "predicted_latency_ms",
    "size_bytes", "artifact",
}  # fmt: skip
RUN = "from flyweight.search.cli import main; main()"

BARE = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
data = numpy.load(sys.argv[2])
answers = session.run(["output"], {"input": data["x"]})[0]
assert not {"torch", "flyweight"} & set(sys.modules)
print(100 * float((answers.argmax(1) == data["y"]).mean()))
"""

BARE_OPENVINO = """
import sys
import numpy, openvino
model = openvino.Core().compile_model(sys.argv[1], "CPU")
data = numpy.load(sys.argv[2])
answers = model({"input": data["x"]})["output"]
assert not {"torch", "flyweight", "onnxruntime"} & set(sys.modules)
print(100 * float((answers.argmax(1) == data["y"]).mean()))
"""


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ``flyweight init`` wrote; its model trains itself once."""
    folder = tmp_path_factory.mktemp("starter") / "digits"
    done = flyweight("init", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def flyweight(*words: Any, cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    with started(*words, cwd=cwd) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@contextmanager
def started(*words: Any, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, of which nothing is left."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, words)], cwd=cwd, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def small(folder: Path, name: str, **changes: Any) -> Path:
    """A spec of a search of four trials and one epoch."""
    values = yaml.safe_load((folder / "search.yaml").read_text())
    values["objective"] = {"speedup": 1.1, "max_drop": 60}
    values["search"] = {"trials": 4, "concurrency": 1}
    values["rungs"] = {"short": 0.5, "full_epochs": 1}
    values["tracking"] = None
    path = folder / name
    path.write_text(yaml.safe_dump(values | changes))
    return path


def entries(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "record.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [e for e in found if e["kind"] == kind]


def wait_for(run: Path, kind: str, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 600
    while len(entries(run, kind)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, f"no {kind}"
        time.sleep(0.1)


def test_a_search_from_init_to_an_artifact_that_runs_bare(starter: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    path = small(starter, "whole.yaml", tracking={"uri": uri, "experiment": "digits"})
    run = tmp_path / "run"
    done = flyweight("search", path, "--out", run, "--json", cwd=starter)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert json.loads(done.stdout) == result
    assert result.keys() == KEYS
    assert result["trials"]["recalibrate"] == 4
    assert result["front"]
    assert result["mlflow_run_id"]
    assert (tmp_path / "mlflow.db").exists()
    assert [r["latency_ms"] for r in result["front"]] == sorted(
        r["latency_ms"] for r in result["front"]
    )
    assert yaml.safe_load((run / "spec.yaml").read_text())["tracking"]["uri"] == uri
    search = entries(run, "search")[0]
    assert len(search["groups"]) <= search["layers"]
    report = (run / "report.html").read_text()
    assert f" of {search['layers']}</td>" in report  # int8 layers
    assert "channels in" not in report  # shares of the widths that the record tells
    assert (run / "teacher" / "model.onnx").stat().st_size == result["teacher"]["size_bytes"]

    code = (
        "import numpy, task, sys; t = task.Digits();"
        "numpy.savez(sys.argv[1], x=numpy.stack([x.numpy() for x, _ in t.test]),"
        "y=numpy.array([y for _, y in t.test]))"
    )
    data = tmp_path / "test.npz"
    subprocess.run([sys.executable, "-c", code, str(data)], cwd=starter, check=True)
    for row in result["front"]:
        assert row.keys() == ROW
        place = run / row["artifact"]
        metrics = json.loads(place.with_name("metrics.json").read_text())
        assert metrics["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest()
        assert metrics["rung"] == "full"
        assert {"seed", "task", "target"} <= metrics.keys()
        policy = json.loads(place.with_name("policy.json").read_text())
        canonical = json.dumps(policy, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(canonical.encode()).hexdigest() == row["digest"]
        bare = subprocess.run(
            [sys.executable, "-c", BARE, str(place), str(data)],
            cwd=tmp_path, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert float(bare.stdout) == pytest.approx(row["metric_test"], abs=1e-4)

    again = flyweight("search", path, "--out", run, cwd=starter)
    assert again.returncode == 2
    assert "--resume" in again.stderr


def test_a_search_for_openvino_gives_artifacts_that_run_bare_there(
    starter: Path, tmp_path: Path
) -> None:
    target = {"runtime": "openvino"}
    path, run = small(starter, "openvino.yaml", target=target), tmp_path / "run"
    done = flyweight("search", path, "--out", run, cwd=starter)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["target"]["runtime"] == "openvino"
    assert "openvino" in entries(run, "search")[0]["versions"]
    assert result["front"]
    code = (
        "import numpy, task, sys; t = task.Digits();"
        "numpy.savez(sys.argv[1], x=numpy.stack([x.numpy() for x, _ in t.test]),"
        "y=numpy.array([y for _, y in t.test]))"
    )
    data = tmp_path / "test.npz"
    subprocess.run([sys.executable, "-c", code, str(data)], cwd=starter, check=True)
    for row in result["front"]:
        bare = subprocess.run(
            [sys.executable, "-c", BARE_OPENVINO, str(run / row["artifact"]), str(data)],
            cwd=tmp_path, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert float(bare.stdout) == pytest.approx(row["metric_test"], abs=0.3)  # bfloat16


def test_a_killed_search_is_resumed_without_repeating(starter: Path, tmp_path: Path) -> None:
    path, run = small(starter, "killed.yaml"), tmp_path / "run"
    with started("search", path, "--out", run, cwd=starter) as process:
        wait_for(run, "end", 2, process)
    before = {e["trial"] for e in entries(run, "end")}
    done = flyweight("search", path, "--out", run, "--resume", cwd=starter)
    assert done.returncode == 0, done.stderr
    ended = [e["trial"] for e in entries(run, "end")]
    assert sorted(ended) == [0, 1, 2, 3]
    begun = [e["trial"] for e in entries(run, "begin")]
    assert sorted(begun) == [0, 1, 2, 3]
    started_at = entries(run, "search")[1]["time"]
    later = {e["trial"] for e in entries(run, "result") if e["time"] >= started_at}
    assert not later & before
    assert json.loads((run / "result.json").read_text())["trials"]["recalibrate"] == 4


def test_ctrl_c_ends_with_the_best_so_far(starter: Path, tmp_path: Path) -> None:
    path = small(starter, "interrupted.yaml", search={"trials": 500, "concurrency": 1})
    run = tmp_path / "run"
    with started("search", path, "--out", run, cwd=starter) as process:
        wait_for(run, "end", 1, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    result = json.loads((run / "result.json").read_text())
    assert result.keys() == KEYS
    assert len(entries(run, "end")) == len(entries(run, "begin"))
    assert (run / "report.html").exists()


def test_a_limit_out_of_reach_costs_nothing(starter: Path, tmp_path: Path) -> None:
    path = small(starter, "far.yaml", objective={"speedup": 10000})
    done = flyweight("search", path, "--out", tmp_path / "run", cwd=starter)
    assert done.returncode == 2, done.stderr
    assert "the fastest policy of this space takes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not entries(tmp_path / "run", "begin")
    assert not (tmp_path / "run" / "artifacts").exists()


def test_an_absent_tracking_server_is_a_note(starter: Path, tmp_path: Path) -> None:
    tracking = {"uri": "http://127.0.0.1:9", "experiment": "digits"}
    search = {"trials": 1, "concurrency": 1}
    path = small(starter, "absent.yaml", tracking=tracking, search=search)
    done = flyweight("search", path, "--out", tmp_path / "run", cwd=starter)
    assert done.returncode == 0, done.stderr
    assert "MLflow lacks" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["front"]


def test_a_run_directory_that_cannot_be_made(starter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = small(starter, "nowhere.yaml")
    done = flyweight("search", path, "--out", tmp_path / "file" / "run", cwd=starter)
    assert done.returncode == 2
    assert "cannot be made" in done.stderr


def test_a_metric_that_is_no_number_is_bad_input(starter: Path, tmp_path: Path) -> None:
    task = starter / "nan.py"
    task.write_text(
        (starter / "task.py").read_text()
        + "\n\nclass Nan(Digits):\n    def metric(self, output, target):\n"
        "        return float('nan')\n"
    )
    path = small(starter, "nan.yaml", task="nan.py:Nan")
    done = flyweight("search", path, "--out", tmp_path / "run", cwd=starter)
    assert done.returncode == 2, done.stderr
    assert "metric" in done.stderr
    assert "Traceback" not in done.stderr
