"""Whole searches through the command line, on the starter task of ``flyweight init``."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml

pytestmark = pytest.mark.slow  # each starts a local Ray and trains

KEYS = {
    "flyweight", "task", "seed", "wall_s", "objective", "trials", "target", "teacher", "front",
    "best", "nearest_miss", "mlflow_run_id", "predicted_by",
}  # fmt: skip
ROW = {
    "digest", "metric", "loss", "metric_test", "latency_ms", "latency_spread",
    "predicted_latency_ms", "drop_error", "size_bytes", "compressed_bytes", "artifact",
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


def held_out(starter: Path, folder: Path) -> Path:
    """The starter's test data, written by a process of its own as x and y."""
    code = (
        "import numpy, task, sys; t = task.Digits();"
        "numpy.savez(sys.argv[1], x=numpy.stack([x.numpy() for x, _ in t.test]),"
        "y=numpy.array([y for _, y in t.test]))"
    )
    data = folder / "test.npz"
    subprocess.run([sys.executable, "-c", code, str(data)], cwd=starter, check=True)
    return data


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
    assert result["predicted_by"] == "timing"
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

    data = held_out(starter, tmp_path)
    for row in result["front"]:
        assert row.keys() == ROW
        place = run / row["artifact"]
        metrics = json.loads(place.with_name("metrics.json").read_text())
        assert metrics["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest()
        assert metrics["rung"] == "full"
        assert {"seed", "task", "target"} <= metrics.keys()
        assert metrics["task"] == result["task"] == "task.py:Digits"  # as the spec says it
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
    data = held_out(starter, tmp_path)
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
    # Who stopped goes on when nothing else is to come.
    before = {e["trial"] for e in entries(run, "end") if e["reason"] != "stopped"}
    done = flyweight("search", run / "spec.yaml", "--out", run, "--resume", cwd=starter)
    assert done.returncode == 0, done.stderr
    ended = [e["trial"] for e in entries(run, "end")]
    assert sorted(set(ended)) == [0, 1, 2, 3]
    assert len(ended) <= 4 + len(entries(run, "again"))
    begun = [e["trial"] for e in entries(run, "begin")]
    assert sorted(begun) == [0, 1, 2, 3]
    started_at = entries(run, "search")[1]["time"]
    later = {e["trial"] for e in entries(run, "result") if e["time"] >= started_at}
    assert not later & before
    rungs = [(e["trial"], e["rung"]) for e in entries(run, "result")]
    assert len(rungs) == len(set(rungs))
    assert json.loads((run / "result.json").read_text())["trials"]["recalibrate"] == 4


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes of a search that train: children of its Ray's raylet."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if "Trainable.train" in (place / "cmdline").read_text():
                raylet = parent(int(place.name))
                if parent(raylet) == process.pid:
                    found.append(int(place.name))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_is_killed(starter: Path, tmp_path: Path, deaths: int) -> None:
    """Its trial goes on from its last rung on another, though it is the last one; not for ever."""
    search, rungs = {"trials": 1, "concurrency": 1}, {"short": 0.1, "full_epochs": 60}
    path, run = small(starter, "died.yaml", search=search, rungs=rungs), tmp_path / "run"
    values = yaml.safe_load(path.read_text())
    # By labels alone, so that training is not given up before a worker is killed.
    values["space"] = values["space"] | {"distill": {"alpha": [0.0, 0.0]}}
    path.write_text(yaml.safe_dump(values))
    killed: set[int] = set()
    with started("search", path, "--out", run, "--json", cwd=starter) as process:
        wait_for(run, "result", 2, process)
        for _ in range(deaths):
            until = time.monotonic() + 120
            while not (busy := set(workers(process)) - killed):
                assert time.monotonic() < until
                time.sleep(0.05)
            (pid,) = busy
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        out, err = process.communicate(timeout=600)
    assert process.returncode == deaths - 1, err  # all that there was failed
    rungs_done = [e["rung"] for e in entries(run, "result")]
    assert len(entries(run, "died")) == 1
    (end,) = entries(run, "end")
    assert not (run / "checkpoints").exists()
    if deaths == 1:
        assert rungs_done == ["recalibrate", "short", "full"]
        assert end["reason"] == "finished"
        assert "note" not in entries(run, "result")[2]  # from its checkpoint
        assert json.loads(out)["trials"] == {"recalibrate": 1, "short": 1, "full": 1}
        assert json.loads(out)["front"]
    else:
        assert rungs_done == ["recalibrate", "short"]
        assert (end["reason"], end["error"][:9]) == ("failed", "poisonous")


def test_a_search_that_is_killed_goes_on_within_a_trial(starter: Path, tmp_path: Path) -> None:
    search, rungs = {"trials": 1, "concurrency": 1}, {"short": 0.1, "full_epochs": 20}
    path, run = small(starter, "within.yaml", search=search, rungs=rungs), tmp_path / "run"
    with started("search", path, "--out", run, cwd=starter) as process:
        wait_for(run, "result", 2, process)
    assert list((run / "checkpoints").glob("*/short-*.safetensors"))
    done = flyweight("search", path, "--out", run, "--resume", cwd=starter)
    assert done.returncode == 0, done.stderr
    results = entries(run, "result")
    assert [e["rung"] for e in results] == ["recalibrate", "short", "full"]
    assert "note" not in results[2]
    assert results[2]["time"] > entries(run, "search")[1]["time"]
    assert not (run / "checkpoints").exists()


def ctrl_c(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)


def timed_out(process: subprocess.Popen[str]) -> None:
    """As ``timeout`` ends a command: the process, and the group that it is in."""
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("end", [ctrl_c, timed_out])
def test_a_search_that_is_told_to_end_ends_with_the_best_so_far(
    starter: Path, tmp_path: Path, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    # Random: it begins at once, without a device profile.
    how = {"trials": 500, "concurrency": 1, "strategy": "random"}
    path = small(starter, "interrupted.yaml", search=how)
    run = tmp_path / "run"
    with started("search", path, "--out", run, cwd=starter) as process:
        wait_for(run, "end", 1, process)
        end(process)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert f"--out {run} --resume` goes on." in out
    result = json.loads((run / "result.json").read_text())
    assert result.keys() == KEYS
    assert len(entries(run, "end")) == len(entries(run, "begin"))
    assert (run / "report.html").exists()


RESIDUAL = """
from task import Digits, WEIGHTS, nn, torch, train, load_file, save_file

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.c2, self.n2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.n2(self.c2(torch.relu(self.n1(self.c1(x))))))

class Residual(Digits):
    def model(self):
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), *map(Block, [32] * 3),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
        )
        weights = WEIGHTS.with_name("residual.safetensors")
        if not weights.exists():
            train(model, self.train)
            save_file(model.state_dict(), weights)
        model.load_state_dict(load_file(weights))
        return model
"""


def test_blocks_are_dropped_trained_and_measured(starter: Path, tmp_path: Path) -> None:
    (starter / "residual.py").write_text(RESIDUAL)
    space = {"prune": {"min_keep": 1, "depth": True}, "quantize": {"precisions": ["fp32"]}}
    # Only without a block is it so fast; of the seven ways to drop some, four are tried.
    changes = {"objective": {"speedup": 1.2}, "task": "residual.py:Residual", "space": space}
    path, run = small(starter, "depth.yaml", **changes), tmp_path / "run"
    done = flyweight("search", path, "--out", run, cwd=starter)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["front"]
    for row in result["front"]:
        model = run / row["artifact"]
        drop = json.loads(model.with_name("policy.json").read_text())["prune"]["drop"]
        assert drop
        left = {tensor.name.partition(".")[0] for tensor in onnx.load(model).graph.initializer}
        assert {f"{block}.c1" for block in {"3", "4", "5"} - left} == set(drop)
        assert f"without {', '.join(drop)}</small>" in (run / "report.html").read_text()
    trained = [e for e in entries(run, "result") if e["rung"] == "full"]
    assert all(e["samples"] > 0 for e in trained)
    assert len(entries(run, "measured")) >= len(result["front"])


def test_a_limit_of_the_compressed_size_is_kept_by_zeros(starter: Path, tmp_path: Path) -> None:
    objective = {"compressed_bytes": 150_000}  # the model has 227 kB, 210 of them when compressed
    space = {
        "prune": {"min_keep": 1, "sparsity": [0.0, 0.75]},
        "quantize": {"precisions": ["fp32"]},
    }
    path = small(starter, "packed.yaml", objective=objective, space=space)
    run = tmp_path / "run"
    done = flyweight("search", path, "--out", run, cwd=starter)
    assert done.returncode == 0, done.stderr
    assert "times when compressed" in done.stdout
    result = json.loads((run / "result.json").read_text())
    teacher, best = (
        result["teacher"],
        next(r for r in result["front"] if r["digest"] == result["best"]),
    )
    assert best["compressed_bytes"] <= 150_000 < best["size_bytes"]
    assert best["size_bytes"] == pytest.approx(teacher["size_bytes"], rel=0.01)
    model = run / best["artifact"]
    assert best["compressed_bytes"] == len(zlib.compress(model.read_bytes()))
    assert json.loads(model.with_name("policy.json").read_text())["prune"]["sparsity"] == 0.75
    begun = {e["digest"]: e["compressed_bytes"] for e in entries(run, "begin")}  # before training
    assert best["compressed_bytes"] == pytest.approx(begun[best["digest"]], rel=0.05)
    plain = [e for e in entries(run, "rejected") if "sparsity" not in e["policy"].get("prune", {})]
    assert plain
    assert all(e["compressed_bytes"] > 150_000 for e in plain)


def test_a_device_profile_predicts_and_prices_a_search(starter: Path, tmp_path: Path) -> None:
    """Made, gone on with, asked, used by a search, and grown by what the search measured."""
    path = tmp_path / "profile.jsonl"
    spec = small(starter, "profiled.yaml", target={"profile": str(path)})
    for networks in (24, 40):
        done = flyweight(
            "profile", "--spec", spec, "-o", path, "--networks", networks, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        lines = path.read_text().splitlines()
        assert len(lines) == 1 + networks
        if networks == 24:
            first = lines
    assert lines[:25] == first

    assert flyweight("sample", "--spec", spec, "-n", 3, "-o", "some", cwd=tmp_path).returncode == 0
    policies = sorted((tmp_path / "some").iterdir())
    words = ("predict", *policies, "--profile", path, "--spec", spec)
    done = flyweight(*words, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert len(cases) == 3
    for case in cases:
        low, middle, high = case["predicted_latency_ms"]
        assert 0 <= low < middle < high

    done = flyweight("search", spec, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    front = result["front"]
    assert front
    assert result["predicted_by"] == "profile"
    why = json.loads((tmp_path / "run" / "explain.json").read_text())
    assert why["digest"] == (result["best"] or result["nearest_miss"])
    (row,) = [row for row in front if row["digest"] == why["digest"]]
    assert why["predicted_latency_ms"] == pytest.approx(row["predicted_latency_ms"], rel=1e-6)
    assert "Where the time goes" in (tmp_path / "run" / "report.html").read_text()
    for row in front:
        low, middle, high = row["predicted_latency_ms"]
        assert low < middle < high
    grown = [json.loads(line)["policy"] for line in path.read_text().splitlines()[41:]]
    assert set(grown) >= {row["digest"] for row in front}

    head = json.loads(lines[0]) | {"fingerprint": "0" * 16}  # of another device
    path.write_text("\n".join([json.dumps(head), *lines[1:]]) + "\n")
    for command in (words, ("plan", spec), ("search", spec, "--out", "foreign")):
        done = flyweight(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert "0" * 16 in done.stderr + done.stdout
    done = flyweight(*words, "--allow-foreign", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "other.json").write_text('{"version": 1, "prune": {"width": {"no.such": 8}}}')
    done = flyweight("predict", "other.json", *words[1:], "--allow-foreign", cwd=tmp_path)
    assert done.returncode == 2
    assert "other.json" in done.stderr
    done = flyweight("profile", "--spec", spec, "-o", path, cwd=tmp_path)
    assert done.returncode == 2
    assert "write to another file" in done.stderr

    here = ("profile", "--spec", spec, "--networks", 8, "-o", "second.jsonl", "--like")
    done = flyweight(*here, path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "second.jsonl").read_text().splitlines()) == len(lines) + 8
    path.unlink()  # the new file holds what it needs
    done = flyweight("predict", *policies, "--profile", "second.jsonl", "--spec", spec, "--json",
                     cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case in json.loads(done.stdout):
        low, middle, high = case["predicted_latency_ms"]
        assert 0 <= low < middle < high
    path.write_text("\n".join(lines) + "\n")
    done = flyweight(*here[:-3], "-o", "third.jsonl", "--like", path, cwd=tmp_path)
    assert done.returncode == 2
    assert "this device itself" in done.stderr
    assert not (tmp_path / "third.jsonl").exists()


def test_a_limit_out_of_reach_costs_nothing(starter: Path, tmp_path: Path) -> None:
    path = small(starter, "far.yaml", objective={"speedup": 10000})
    done = flyweight("search", path, "--out", tmp_path / "run", cwd=starter)
    assert done.returncode == 2, done.stderr
    assert "the fastest policy of this space takes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_finalists_are_measured_is_an_interruption(
    starter: Path, tmp_path: Path
) -> None:
    path = small(starter, "late.yaml", search={"trials": 2, "concurrency": 1})
    run = tmp_path / "run"
    with started("search", path, "--out", run, cwd=starter) as process:
        assert process.stdout is not None
        assert any(line.startswith("Measuring") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    predicted = json.loads((run / "result.json").read_text())["front"]
    assert predicted  # the best so far, not measured
    assert all(row["latency_spread"] is None for row in predicted)
    done = flyweight("search", path, "--out", run, "--resume", cwd=starter)
    assert done.returncode == 0, done.stderr
    measured = json.loads((run / "result.json").read_text())["front"]
    assert measured
    assert all(row["latency_spread"] is not None for row in measured)


def test_a_search_whose_trials_all_fail_ends_early_and_says_why(
    starter: Path, tmp_path: Path
) -> None:
    (starter / "later.py").write_text(
        "from task import Digits\n\n\nclass Later(Digits):\n"
        "    def loss(self, output, target):\n"
        "        if output.requires_grad and len(target) > 16:\n"
        "            raise ValueError('no loss for a whole batch')\n"
        "        return super().loss(output, target)\n"
    )
    how = {"trials": 500, "concurrency": 1, "strategy": "random"}
    path = small(starter, "later.yaml", task="later.py:Later", search=how)
    run = tmp_path / "run"
    done = flyweight("search", path, "--out", run, cwd=starter)
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "x short: ValueError: no loss for a whole batch (later.py, line 7)" in said
    assert "Traceback" not in done.stdout + done.stderr
    assert len(entries(run, "begin")) < 100
    assert (run / "report.html").exists()


def test_nothing_within_the_limits_is_the_last_word(starter: Path, tmp_path: Path) -> None:
    task = starter / "best.py"  # no student, which a worker scores, is as good as the teacher
    task.write_text(
        "import sys\nfrom task import Digits\n\n\nclass Best(Digits):\n"
        "    def metric(self, output, target):\n"
        "        return 100.0 if 'search' in sys.argv else 50.0\n"
    )
    objective = {"speedup": 1.1, "max_drop": 0}
    path = small(starter, "strict.yaml", task="best.py:Best", objective=objective)
    done = flyweight("search", path, "--out", tmp_path / "run", cwd=starter)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Nothing keeps to the limits. Nearest: ")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best"] is None
    assert result["nearest_miss"]


def test_a_plan_out_of_reach_is_code_1(starter: Path) -> None:
    objective = {"speedup": 10000, "size_bytes": 100}
    done = flyweight("plan", small(starter, "far.yaml", objective=objective), cwd=starter)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("OUT OF REACH of this space") == 2
    assert "Not pruned: 12 (its outputs are the answer)" in done.stdout
    assert "Groups of channels that may be pruned" in done.stdout
    assert "Layers in fp32 or int8: 0, 3, 7, 12" in done.stdout
    assert flyweight("plan", small(starter, "near.yaml"), cwd=starter).returncode == 0


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


def test_a_search_prepares_itself_and_the_next_has_it_from_the_cache(
    starter: Path, tmp_path: Path
) -> None:
    how = {"trials": 16, "concurrency": 2, "time_budget": "3m"}
    path = small(starter, "prepared.yaml", search=how, objective={"speedup": 1.3, "max_drop": 60})
    done = flyweight("search", path, "--out", tmp_path / "one", cwd=starter)
    assert done.returncode == 0, done.stderr
    assert "Timing networks" in done.stdout
    assert "Judging single choices" in done.stdout
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["predicted_by"] == "profile"
    assert result["best"]
    table = json.loads((tmp_path / "one" / "sensitivity.json").read_text())
    assert table["judged"] > 10
    assert all(harm >= 0 for known in table["harm"].values() for harm in known.values())
    spec = yaml.safe_load((tmp_path / "one" / "spec.yaml").read_text())
    assert spec["target"]["profile"] == str(tmp_path / "one" / "profile.jsonl")
    assert "What is fragile" in (tmp_path / "one" / "report.html").read_text()

    done = flyweight("search", path, "--out", tmp_path / "two", cwd=starter)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "two" / "sensitivity.json").read_text())
    assert again["harm"] == table["harm"]
    assert again["seconds"] < table["seconds"]  # nothing is judged twice
    # Another limit: what is known is judged by it, and nothing more is trained.
    first = (tmp_path / "one" / "record.jsonl").read_text().splitlines()
    values = yaml.safe_load(path.read_text()) | {"objective": {"speedup": 1.6, "max_drop": 60}}
    path.write_text(yaml.safe_dump(values))
    done = flyweight("search", path, "--out", tmp_path / "one", "--resume", cwd=starter)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "one" / "record.jsonl").read_text().splitlines()
    added = [json.loads(line)["kind"] for line in lines[len(first) :]]
    assert not {"begin", "result"} & {*added}
    after = json.loads((tmp_path / "one" / "result.json").read_text())
    assert after["objective"]["speedup"] == 1.6
    rows = {row["digest"]: row for row in after["front"]}
    if after["best"]:
        teacher = after["teacher"]["latency_ms"]
        assert rows[after["best"]]["latency_ms"] <= teacher / 1.6


def test_a_search_interrupted_before_its_trials_can_go_on(starter: Path, tmp_path: Path) -> None:
    how = {"trials": 16, "concurrency": 1}
    path = small(starter, "early.yaml", search=how, space={"prune": {"min_keep": 0.25}})
    run = tmp_path / "run"
    with started("search", path, "--out", run, cwd=starter) as process:
        wait_for(run, "search", 1, process)  # the profile is there, the table is not
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    if (run / "result.json").exists():  # not where the signal came just before the trials
        assert json.loads((run / "result.json").read_text())["front"] == []
    done = flyweight("search", path, "--out", run, "--resume", cwd=starter)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["trials"]["recalibrate"] == 16


def test_a_task_that_workers_make_otherwise_is_refused_with_one_line(
    starter: Path, tmp_path: Path
) -> None:
    (starter / "anew.py").write_text(
        "import torch\nfrom task import Digits, network\n\n\nclass Anew(Digits):\n"
        "    def model(self):\n        torch.seed()\n        return network()\n"
    )
    how = {"trials": 4, "concurrency": 2}
    path, run = small(starter, "anew.yaml", task="anew.py:Anew", search=how), tmp_path / "run"
    done = flyweight("search", path, "--out", run, cwd=starter)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("flyweight: task: model() must be the same each time that the task is")
    assert "Traceback" not in done.stdout
    assert not run.exists()
