"""Deploying from a hand-made run into a real MLflow database, verified by a real clean process."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from flyweight.kernels import make_runtime
from flyweight.search.choose import choose, kebab, read_result, task_name
from flyweight.search.cli import main
from flyweight.search.deploy import Deployed, deploy
from flyweight.search.folder import describe
from flyweight.search.registries import remember_registry, rollback
from flyweight.search.store import write_request
from flyweight.spaces import BadInput, FlyweightError, Policy, Prune

TASK = """
import torch
from flyweight.compressors import ClassificationTask
from torch.utils.data import TensorDataset

class TinyNet(ClassificationTask):
    def __init__(self, shift=0):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(400, 4, generator=g)
        y = (x[:, :3].argmax(1) + shift) % 3
        y[::10] = (y[::10] + 1) % 3  # a tenth is wrong, so that no score is perfect
        data = TensorDataset(x, y)
        super().__init__(torch.nn.Linear(4, 3), data, data)
"""
GOOD, FAST, SPARE = (Policy(prune=Prune(width={"stem": w})) for w in (24, 16, 8))


def tiny_model(scale: float = 1.0, blind: bool = False) -> bytes:
    """A classifier that is right where TinyNet's labels are; ``blind``: not on class 2."""
    weight = np.eye(4, 3, dtype=np.float32) * scale
    if blind:
        weight[:, 2] = 0
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["output"])],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def score(model: bytes, run: Path) -> float:
    """The accuracy on selection validation, by a session in this process."""
    from flyweight.compressors import load_task
    from flyweight.compressors.data import split

    held = split(load_task("task.py:TinyNet", run, {})).selection
    answers = make_runtime("onnxruntime", 1).load(model).run({"input": held.inputs.numpy()})
    return float(100 * (answers.argmax(1) == held.targets.numpy()).mean())


@dataclass(frozen=True)
class Run:
    path: Path
    uri: str

    def deploy(self, **how: Any) -> Deployed:
        return deploy(self.path, **({"tracking_uri": self.uri} | how))

    def change(self, name: str, **values: Any) -> None:
        place = self.path / name
        place.write_text(json.dumps(json.loads(place.read_text()) | values))

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def names(self) -> list[str]:
        return [model.name for model in self.client().search_registered_models()]

    def champion(self, name: str, alias: str = "champion") -> str:
        return str(self.client().get_model_version_by_alias(name, alias).version)

    def version(self, got: Deployed) -> Any:
        return self.client().get_model_version(got.name, got.version)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> str:
    return f"sqlite:///{shutil.copy(mlflow_database, tmp_path_factory.mktemp('mlflow'))}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of three artifacts: two on the front, one off it."""
    run = tmp_path_factory.mktemp("made") / "run"
    run.mkdir()
    (run / "task.py").write_text(TASK)
    target = {
        "runtime": "onnxruntime", "threads": 1, "batch_size": 1,
        "fingerprint": make_runtime("onnxruntime", 1).fingerprint,
    }  # fmt: skip
    front = []
    for policy, model, latency in (
        (FAST, tiny_model(blind=True), 0.1), (GOOD, tiny_model(), 0.2), (SPARE, tiny_model(2), None)
    ):  # fmt: skip
        place = run / "artifacts" / policy.digest
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(model)
        (place / "policy.json").write_text(json.dumps(policy.to_dict()))
        metrics = {"sha256": hashlib.sha256(model).hexdigest(), "metric": score(model, run)}
        (place / "metrics.json").write_text(json.dumps(metrics | {"rung": "full", "seed": 0}))
        if latency:
            front.append(
                {"digest": policy.digest, "metric": metrics["metric"], "latency_ms": latency}
            )
    spec = {
        "task": str(run / "task.py") + ":TinyNet", "task_args": {},
        "objective": {"max_drop": 0.5},
        "tracking": {"uri": "sqlite:///:memory:", "experiment": "e"},
    }  # fmt: skip
    (run / "spec.yaml").write_text(yaml.safe_dump(spec))
    result = {
        "task": spec["task"], "target": target, "front": front, "best": GOOD.digest,
        "nearest_miss": None, "mlflow_run_id": None,
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def run(made: Path, server: str, tmp_path: Path) -> Run:
    shutil.copytree(made, tmp_path / "run")
    return Run(tmp_path / "run", server)


def picked(run: Run, digest: str | None = None, max_latency_ms: float | None = None) -> str:
    return choose(run.path, read_result(run.path), digest, max_latency_ms)


def test_the_best_is_chosen_else_what_was_asked_for(run: Run) -> None:
    assert picked(run) == GOOD.digest
    assert picked(run, SPARE.digest[:10]) == SPARE.digest  # off the front, but there
    assert picked(run, max_latency_ms=0.15) == FAST.digest
    assert picked(run, max_latency_ms=9) == GOOD.digest


@pytest.mark.parametrize(
    ("digest", "limit", "message"),
    [
        ("ffff", None, f"'ffff' is no artifact .* known: .*{GOOD.digest[:12]}"),
        ("", None, "several artifacts"),
        (None, 0.05, r"at most 0.05 ms; the fastest takes 0.100 ms"),
        ("ab", 1.0, "not both"),
    ],
)
def test_a_choice_that_cannot_be_met_says_what_there_is(
    run: Run, digest: str | None, limit: float | None, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        picked(run, digest, limit)


def test_nothing_feasible_names_the_nearest_miss(run: Run) -> None:
    run.change("result.json", best=None, nearest_miss=FAST.digest)
    with pytest.raises(BadInput, match=f"--digest {FAST.digest[:12]}"):
        picked(run)
    run.change("result.json", best=None, nearest_miss=None)
    with pytest.raises(BadInput, match=r"has no artifact: no trial finished .* go on: flyweight"):
        picked(run)


def test_what_is_deployed_though_it_misses_the_limits_says_so(run: Run) -> None:
    teacher = {"metric": 95.0, "metric_test": None, "latency_ms": 0.3, "size_bytes": 400}
    objective = {"speedup": 2.0, "max_drop": 1000.0}
    run.change("result.json", teacher=teacher, objective=objective)
    words = ["deploy", str(run.path), "--digest", GOOD.digest, "--tracking-uri", run.uri]
    done = CliRunner().invoke(main, [*words, "--name", "told"])
    assert done.exit_code == 0, done.output
    assert "It misses limits of its search: 1.50 times faster, the limit is 2.\n" in done.output
    assert f"told version 1 is champion: {GOOD.digest[:12]}" in done.output
    words[3] = FAST.digest
    done = CliRunner().invoke(main, [*words, "--name", "told"])
    assert f"version 2 is champion, in place of version 1: {FAST.digest[:12]}" in done.output
    run.change("result.json", objective=objective | {"max_drop": 0.0})
    (miss,) = run.deploy(name="told", digest=FAST.digest).misses
    assert miss.endswith("points lost, the limit is 0")
    off = run.deploy(name="told", digest=SPARE.digest)  # of what is not measured nothing is said
    assert off.latency_ms is None
    assert all("faster" not in miss for miss in off.misses)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not the directory of a search that ended"):
        deploy(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(BadInput, match="not the result of a search"):
        deploy(tmp_path)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("task.py:FashionMnist", "fashion-mnist"), ("a.b:HTTPTask", "http-task"),
        ("/x/t.py:Net2D", "net2-d"), ("t.py:my_task", "my-task"),
    ],
)  # fmt: skip
def test_models_are_named_after_the_task(task: str, name: str) -> None:
    assert kebab(task_name(task)) == name


def test_a_version_says_what_it_is_and_loads_through_mlflow(run: Run) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    got = run.deploy(name="says")
    assert mlflow.get_tracking_uri() == before
    assert (got.version, got.digest, got.reused, got.same_device) == ("1", GOOD.digest, False, True)
    tags = run.version(got).tags
    assert tags["flyweight.digest"] == GOOD.digest
    assert tags["flyweight.task"] == "task.py:TinyNet"
    assert float(tags["flyweight.metric"]) == pytest.approx(got.metric, abs=1e-3)
    assert float(tags["flyweight.latency_ms"]) == 0.2
    assert tags["flyweight.fingerprint"] == make_runtime("onnxruntime", 1).fingerprint

    mlflow.set_tracking_uri(run.uri)
    try:
        model = mlflow.pyfunc.load_model(got.uri)
        stored = mlflow.artifacts.download_artifacts(f"{got.uri}/model.onnx")
    finally:
        mlflow.set_tracking_uri(before)
    rows = np.eye(4, dtype=np.float32)[:3]
    assert model.predict({"input": rows})["output"].argmax(1).tolist() == [0, 1, 2]
    signature = model.metadata.signature  # which MLflow's page of the version shows
    assert [(t.name, t.type, t.shape) for t in signature.inputs] == [
        ("input", np.dtype("float32"), (-1, 4))
    ]
    assert [(t.name, t.type, t.shape) for t in signature.outputs] == [
        ("output", np.dtype("float32"), (-1, 3))
    ]
    assert model.input_example["input"].shape == (1, 4)
    artifact = run.path / "artifacts" / GOOD.digest
    assert Path(stored).read_bytes() == (artifact / "model.onnx").read_bytes()
    files = run.client().list_artifacts(run.version(got).run_id, f"deployed/{GOOD.digest[:12]}")
    assert {Path(file.path).name for file in files} == {"policy.json", "metrics.json"}


def test_again_is_the_same_version_and_the_alias_moves_and_goes_back(run: Run) -> None:
    first = run.deploy(name="moves")
    again = run.deploy(name="moves")
    assert (again.version, again.reused, again.previous) == (first.version, True, first.version)
    second = run.deploy(name="moves", digest=FAST.digest)
    assert (second.version, second.previous) == ("2", "1")
    assert run.champion("moves") == "2"
    assert run.version(second).tags["flyweight.previous.champion"] == "1"
    other = run.deploy(name="moves", digest=FAST.digest, alias="candidate")
    assert (other.version, other.previous) == ("2", None)

    assert rollback("moves", tracking_uri=run.uri).version == "1"
    assert run.champion("moves") == "1"
    assert run.champion("moves", "candidate") == "2"
    with pytest.raises(BadInput, match=r"had no version before 1, .* `flyweight deploy RUN_DIR"):
        rollback("moves", tracking_uri=run.uri)
    words = (
        r"no version of 'moves' has the alias 'other' .*\(known: candidate, champion\); .* deploy"
    )
    with pytest.raises(BadInput, match=words):
        rollback("moves", alias="other", tracking_uri=run.uri)


def test_it_joins_the_run_of_the_search_whose_end_stays(run: Run) -> None:
    client = run.client()
    experiment = client.create_experiment("of the search", str(run.path / "mlartifacts"))
    parent = client.create_run(experiment).info.run_id
    client.set_terminated(parent, "KILLED", 1_000_000)
    run.change("result.json", mlflow_run_id=parent)
    got = run.deploy(name="joins")
    assert run.version(got).run_id == parent
    info = client.get_run(parent).info
    assert (info.status, info.end_time) == ("KILLED", 1_000_000)
    run.change("result.json", mlflow_run_id="0" * 32)  # another server has it
    assert run.deploy(name="joins", digest=FAST.digest).version == "2"


def refused(run: Run, error: type[Exception], message: str, **how: Any) -> None:
    with pytest.raises(error, match=message):
        run.deploy(name="refused", **how)
    assert "refused" not in run.names()


def test_a_flipped_byte_is_refused(run: Run) -> None:
    place = run.path / "artifacts" / GOOD.digest / "model.onnx"
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
    refused(run, FlyweightError, "damaged: its SHA-256 is")


def test_a_byte_flipped_after_it_was_read_is_seen_by_the_clean_process(run: Run) -> None:
    place = run.path / "artifacts" / GOOD.digest / "model.onnx"
    done = verify(place, "0" * 64, run.path)
    assert done.returncode == 1
    assert "is not the file that was scored" in done.stderr


def verify(model: Path, sha256: str, folder: Path, python: tuple[str, ...] = ()) -> Any:
    np.savez(folder / "inputs.npz", input=np.eye(4, dtype=np.float32))
    how = python or ("-m", "flyweight.search.verify")
    where = [str(folder / "inputs.npz"), str(folder / "output.npy")]
    command = [sys.executable, *how, str(model), sha256, "onnxruntime", "1", *where]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_clean_process_is_clean_and_says_so_when_it_is_not(run: Run) -> None:
    place = run.path / "artifacts" / GOOD.digest / "model.onnx"
    sha256 = hashlib.sha256(place.read_bytes()).hexdigest()
    done = verify(place, sha256, run.path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"fingerprint"}
    assert np.load(run.path / "output.npy", allow_pickle=False).shape == (4, 3)

    spoiled = (
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
        "from flyweight.search.verify import main; sys.exit(main(sys.argv[1:]))"
    )
    done = verify(place, sha256, run.path, ("-c", spoiled))
    assert done.returncode == 1
    assert "not clean: it loaded ['torch']" in done.stderr


@pytest.mark.parametrize("metric", [99.9, float("nan"), None])
def test_a_metric_that_is_not_what_was_said_is_refused(run: Run, metric: float | None) -> None:
    run.change(f"artifacts/{GOOD.digest}/metrics.json", metric=metric)
    refused(run, FlyweightError, "nothing was registered")


def test_a_metric_of_0_to_1_is_verified_as_one_in_per_cent(run: Run) -> None:
    task = (run.path / "task.py").read_text()
    scaled = (
        "    def metric(self, output, target):\n        return super().metric(output, target) / 100"
    )
    (run.path / "task.py").write_text(f"{task.rstrip()}\n\n{scaled}\n")
    spec = yaml.safe_load((run.path / "spec.yaml").read_text())
    mine = spec | {"task": f"{run.path / 'task.py'}:TinyNet"}
    (run.path / "spec.yaml").write_text(yaml.safe_dump(mine))
    name = f"artifacts/{GOOD.digest}/metrics.json"
    true = json.loads((run.path / name).read_text())["metric"] / 100
    run.change("result.json", teacher={"metric": 0.9})
    run.change(name, metric=true - 0.01)  # a point
    refused(run, FlyweightError, "nothing was registered")


def test_a_model_that_is_no_model_is_refused(run: Run) -> None:
    folder = run.path / "artifacts" / GOOD.digest
    (folder / "model.onnx").write_bytes(b"no model")
    sha256 = hashlib.sha256(b"no model").hexdigest()
    run.change(f"artifacts/{GOOD.digest}/metrics.json", sha256=sha256)
    refused(run, FlyweightError, "failed in a clean process .* cannot load the model")


def test_a_missing_provider_is_refused(run: Run) -> None:
    result = read_result(run.path)
    run.change("result.json", target=result["target"] | {"runtime": "onnxruntime-cuda"})
    refused(run, FlyweightError, "CUDAExecutionProvider")


@pytest.mark.parametrize("how", [{"alias": "latest"}, {"alias": "v2"}, {"alias": "a b"}])
def test_an_alias_that_mlflow_keeps_is_refused(run: Run, how: dict[str, str]) -> None:
    refused(run, BadInput, "an alias is of", **how)
    with pytest.raises(BadInput, match="a model's name is of"):
        run.deploy(name="a/b")


def test_the_name_of_another_task_is_refused_without_force(run: Run) -> None:
    run.deploy(name="taken")
    (run.path / "task.py").rename(run.path / "other.py")
    spec = yaml.safe_load((run.path / "spec.yaml").read_text())
    spec["task"] = f"{run.path}/other.py:TinyNet"
    (run.path / "spec.yaml").write_text(yaml.safe_dump(spec))
    run.change("result.json", task=spec["task"])
    with pytest.raises(BadInput, match=r"of the task task.py:TinyNet, not of other.py:TinyNet"):
        run.deploy(name="taken", digest=FAST.digest)
    assert run.champion("taken") == "1"
    assert run.deploy(name="taken", digest=FAST.digest, force=True).version == "2"

    run.client().create_registered_model("foreign")
    with pytest.raises(BadInput, match="something that flyweight did not register"):
        run.deploy(name="foreign")


def test_a_server_that_is_down_is_named_without_its_password(run: Run) -> None:
    with socket.socket() as taken:  # bound and not listening: nothing else answers there
        taken.bind(("127.0.0.1", 0))
        uri = f"http://me:hunter2@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FlyweightError, match=r"registry at http://\*\*\*@127.0.0.1") as caught:
            run.deploy(name="down", tracking_uri=uri)
    assert "hunter2" not in str(caught.value)


class Answers(http.server.BaseHTTPRequestHandler):
    """Says ``body`` with the status ``code``, whatever is asked."""

    code, body = 200, b""

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None: ...


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (401, b"not authenticated", "does not know who asks; set MLFLOW_TRACKING_USERNAME"),
        (403, b"Permission denied", r"you may not do this there \(Permission denied\)"),
        (403, b"Invalid Host header", "start it with --allowed-hosts"),
        (404, b"<html>nothing</html>", "is no MLflow server; give http://HOST:PORT"),
        (200, b"<html>hello</html>", "is no MLflow server"),
        (503, b"away", "the server answers HTTP 503"),
    ],
)
def test_what_another_server_answers_is_one_clear_line(code: int, body: bytes, words: str) -> None:
    handler = type("Handler", (Answers,), {"code": code, "body": body})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(FlyweightError, match=words) as caught:
                rollback("net", tracking_uri=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:1", r"nothing answers there \(connection refused\)"),
        ("no-such-scheme://host", "no registry at such an address; give http"),
        ("mlruns", "no registry at such an address; give http"),
        ("mysql://me:hunter2@127.0.0.1:1/x", "needs the Python package MySQLdb"),
        ("sqlite:////proc/none.db", "there is no MLflow database /proc/none.db, so 'net' is not"),
        ("sqlite:////proc", "the database says: unable to open database file"),
    ],
)
def test_an_address_at_which_there_is_no_registry(uri: str, words: str) -> None:
    with pytest.raises(FlyweightError, match=words) as caught:
        rollback("net", tracking_uri=uri)
    assert len(str(caught.value)) < 250
    assert "hunter2" not in str(caught.value)


def test_where_it_was_deployed_is_remembered_for_who_goes_back(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mlflow_database: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(BadInput, match="where is 'kept' registered"):
        rollback("kept")
    run.deploy(name="kept")
    run.deploy(name="kept", digest=FAST.digest)
    assert rollback("kept").version == "1"
    with pytest.raises(BadInput, match="where is 'other' registered"):
        rollback("other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_database}")  # it goes before
    with pytest.raises(BadInput, match="no version of 'kept' has the alias"):
        rollback("kept")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    remember_registry("kept", "sqlite:///here.db")
    monkeypatch.chdir("/")  # it is there that it is looked for
    with pytest.raises(BadInput, match=f"there is no MLflow database {tmp_path / 'here.db'}"):
        rollback("kept")
    assert not (tmp_path / "here.db").exists()
    remember_registry("kept", "http://me:hunter2@there:5000")
    with pytest.raises(BadInput, match="an address with a password, which is not kept"):
        rollback("kept")
    assert not any("hunter2" in place.read_text() for place in (tmp_path / "state").rglob("*.json"))


def test_the_last_lines_say_where_it_is_and_how_it_is_served(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    words = ["deploy", run.path, "--alias", "next", "--name", "said", "--tracking-uri"]
    file = Path(run.uri.removeprefix("sqlite:///"))
    for uri in (run.uri, f"sqlite:///{os.path.relpath(file)}"):  # found again from anywhere
        done = CliRunner().invoke(main, [*map(str, words), uri])
        *_, where, then = done.output.splitlines()
        assert where == f"Registered in {run.uri} as said, version 1, alias next. Next:"
        assert then == "  flyweight serve said@next"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    done = CliRunner().invoke(main, [*map(str, words), run.uri])
    assert done.output.endswith(f"\n  flyweight serve said@next --tracking-uri {run.uri}\n")
    shown = replace(run.deploy(name="said", alias="next"), tracking_uri="http://***@there:5000")
    monkeypatch.setattr("flyweight.search.deploy.deploy", lambda *_, **__: shown)
    done = CliRunner().invoke(main, [*map(str, words), "http://me:hunter2@there:5000"])
    *_, where, then = done.output.splitlines()
    assert where.endswith(". Next, with that address in full as --tracking-uri:")
    assert then == "  flyweight serve said@next"  # what is printed works once that is given


def with_teacher(run: Run, **latencies: float) -> None:
    """What an artifact is timed beside: a teacher of 0.2 ms, unless told."""
    place = run.path / "teacher"
    place.mkdir()
    (place / "model.onnx").write_bytes(tiny_model(3))
    np.savez(place / "request.npz", input=np.ones((1, 4), np.float32))
    teacher = {"metric": 95.0, "metric_test": None, "latency_ms": 0.2, "size_bytes": 400}
    run.change("result.json", teacher=teacher | latencies, objective={})


def test_its_latency_is_verified_beside_the_teacher(run: Run) -> None:
    with_teacher(run, latency_ms=0.002)  # the artifact was slower than it is
    got = run.deploy(name="timed")
    assert got.verified_latency_ms is not None
    assert 0 < got.verified_latency_ms < 100
    assert run.deploy(name="timed", digest=SPARE.digest).verified_latency_ms is None  # never timed


def test_an_artifact_that_is_slower_than_was_measured_is_refused(run: Run) -> None:
    with_teacher(run, latency_ms=20.0)  # 100 times faster than a teacher that is just like it
    refused(run, FlyweightError, "times faster than the teacher, timed here now, but 100.00 times")
    result = read_result(run.path)  # elsewhere it says nothing of what was measured
    run.change("result.json", target=result["target"] | {"fingerprint": "f" * 16})
    assert not run.deploy(name="elsewhere").same_device


def test_a_database_that_cannot_be_opened_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    uri = f"sqlite:///{tmp_path}/file/mlflow.db"
    with pytest.raises(FlyweightError, match=f"registry at {uri} failed"):
        run.deploy(name="down", tracking_uri=uri)


def test_a_run_directory_without_an_address_asks_for_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = yaml.safe_load((run.path / "spec.yaml").read_text())
    spec["tracking"]["uri"] = "http://***@mlflow.example"
    (run.path / "spec.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for folder in (None, run.path / "edge"):  # it was tracked: not to register would be a surprise
        with pytest.raises(BadInput, match="--tracking-uri"):
            run.deploy(tracking_uri=None, folder=folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    assert run.deploy(name="asks", tracking_uri=None).version == "1"


def test_a_search_without_tracking_gives_a_folder_without_a_registry(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = yaml.safe_load((run.path / "spec.yaml").read_text())
    (run.path / "spec.yaml").write_text(yaml.safe_dump(spec | {"tracking": None}))
    write_request(run.path, {"input": np.eye(4, dtype=np.float32)[:1]})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words, folder = ["deploy", str(run.path)], tmp_path / "edge"
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    model = run.path / "artifacts" / GOOD.digest / "model.onnx"
    for named in ("give --tracking-uri or set MLFLOW_TRACKING_URI", str(model), "--folder DIR"):
        assert named in done.output

    words += ["--folder", str(folder)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    first, verified, *_, wrote, last = done.output.splitlines()
    assert first == f"tiny-net: {GOOD.digest[:12]}"
    assert verified.startswith("Verified in a clean process: metric ")
    assert wrote.startswith(f"Wrote {folder}: `python {folder}/example.py`")
    assert last.startswith("Nothing was registered: ")
    assert (folder / "model.onnx").read_bytes() == model.read_bytes()

    done = CliRunner().invoke(main, [*words, "--tracking-uri", run.uri, "--name", "both"])
    assert f"\nWrote {folder}: " in done.output
    assert f"\nRegistered in {run.uri} as both, version 1, " in done.output
    run.change(f"artifacts/{GOOD.digest}/metrics.json", metric=99.9)
    shutil.rmtree(folder)
    with pytest.raises(FlyweightError, match="nothing was registered"):
        run.deploy(tracking_uri=None, folder=folder)
    assert not folder.exists()


def test_another_device_is_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    result = read_result(run.path)
    run.change("result.json", target=result["target"] | {"fingerprint": "f" * 16})
    assert not run.deploy(name="device").same_device
    assert "flyweight measure" in caplog.text


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_folder_runs_with_nothing_but_a_runtime(run: Run, tmp_path: Path, runtime: str) -> None:
    folder, target = tmp_path / "edge", read_result(run.path)["target"]
    target |= {"runtime": runtime, "fingerprint": make_runtime(runtime, 1).fingerprint}
    run.change("result.json", target=target)
    with pytest.raises(BadInput, match=r"request.npz, the request .* cannot be read"):
        run.deploy(name=f"folder-{runtime}", folder=folder)
    assert not folder.exists()
    write_request(run.path, {"input": np.array([[0, 2, 1, 0], [3, 0, 0, 0]], np.float32)})
    deployed = run.deploy(name=f"folder-{runtime}", folder=folder)
    assert deployed.folder == folder
    assert deployed.same_device  # so the clean process ran it there
    files = {"model.onnx", "policy.json", "io.json", "example.py", "request.npz"}
    assert {place.name for place in folder.iterdir()} == files
    io = json.loads((folder / "io.json").read_text())
    assert io["inputs"] == [{"name": "input", "dtype": "float32", "shape": [None, 4]}]
    assert io["outputs"] == [{"name": "output", "dtype": "float32", "shape": [None, 3]}]
    assert Policy.from_json((folder / "policy.json").read_text()) == GOOD
    check = (
        "import runpy, sys; sys.argv = ['example.py', '5']; runpy.run_path('example.py'); "
        "print({'torch', 'flyweight', 'mlflow', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, *_ = done.stdout.splitlines()
    assert answer == "(5, 3) float32 [0. 2. 1.]"  # of the run's own request, whose rows go round
    assert done.stdout.splitlines()[-1] == "set()"
    example = (folder / "example.py").read_text()
    assert f"import {runtime} as" in example
    assert len(example.splitlines()) <= 26


def test_inputs_that_are_initializers_are_not_asked_for() -> None:
    model = onnx.load_model_from_string(tiny_model())
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    assert [i["name"] for i in describe(model.SerializeToString())["inputs"]] == ["input"]
