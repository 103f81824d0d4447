"""Jobs on a real Ray head with a token, and what is refused without one."""

import contextlib
import hashlib
import http.server
import importlib.metadata
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray.job_submission import JobSubmissionClient

from flyweight.search import cluster
from flyweight.search.cli import main
from flyweight.search.package import ROOMS, pack
from flyweight.search.remembered import remember
from flyweight.spaces import BadInput

ROOT = Path(__file__).parents[1]
TOKEN = hashlib.sha256(b"a token of this test").hexdigest()
SPEC = {"task": "task.py:Net", "objective": {"max_drop": 0.5}, "tracking": None}


def folder_with_spec(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "task.py").write_text("class Net: ...\n")
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC | changes))
    return folder / "spec.yaml"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's own Ray: no token, no address."""
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # nor the last job


def test_the_token_is_read_from_where_ray_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cluster.token() is None
    (tmp_path / "absent").write_text("of the file\n")
    assert cluster.token() == "of the file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the variable")
    assert cluster.token() == "of the variable"


def test_a_spec_is_checked_before_it_leaves(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:1"
    spec = folder_with_spec(tmp_path / "a", objektive=1)
    with pytest.raises(BadInput, match="objektive: unknown key"):
        cluster.submit(spec, nowhere)
    spec = folder_with_spec(tmp_path / "b", task="../a/task.py:Net")
    with pytest.raises(BadInput, match="the folder that travels"):
        cluster.submit(spec, nowhere)
    spec = folder_with_spec(tmp_path / "c", task="none.py:Net")
    with pytest.raises(BadInput, match="no file"):
        cluster.submit(spec, nowhere)


def test_a_job_goes_on_with_the_search_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def connected(_: str) -> Iterator[Any]:
        yield SimpleNamespace(submit_job=lambda **job: sent.append(job))

    monkeypatch.setattr(cluster, "_connected", connected)
    spec = folder_with_spec(tmp_path / "a")
    with pytest.raises(BadInput, match="--resume: the last job from here was not of"):
        cluster.submit(spec, "http://h", resume=True)
    cluster.submit(spec, "http://h")
    cluster.submit(spec, "http://h", resume=True)
    cluster.submit(spec, "http://h", resume=True, out="/runs/other")
    places = [job["metadata"]["flyweight.out"] for job in sent]
    assert places[0] == places[1] != "/runs/other"
    assert [job["entrypoint"].endswith(" --resume") for job in sent] == [False, True, True]
    assert "--out /runs/other " in sent[2]["entrypoint"]


def test_earlier_runs_stay_behind(tmp_path: Path) -> None:
    for place in ("run", "kept/older"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "record.jsonl").touch()
    assert sorted(cluster._runs(tmp_path)) == ["/kept/older/", "/run/"]
    assert cluster._runs(tmp_path / "run") == []  # of which the spec is taken


def test_a_database_file_is_told_to_stay_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = folder_with_spec(tmp_path / "a", tracking={"uri": "sqlite:///mlflow.db"})
    cluster.check_travels(cluster.load_spec(spec))
    assert "Name an MLflow server" in caplog.text


def test_an_address_at_which_nothing_answers(tmp_path: Path) -> None:
    spec = folder_with_spec(tmp_path / "a")
    with socket.socket() as taken:  # bound and not listening: nothing else answers there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"nothing answers at http://\*\*\*@127.0.0.1:{port}"):
            cluster.submit(spec, f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(BadInput, match="is a cluster's dashboard"):
        cluster.submit(spec, "ray://127.0.0.1:10001")


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (200, "<html>hello</html>", "not as a Ray cluster does"),
        (200, "[]", "not as a Ray cluster does"),
        (302, "", "not as a Ray cluster does"),
        (200, '{"ray_version": "1.0"}', "runs Ray 1.0, this is Ray "),
        (401, "", "asks for a token.* set RAY_AUTH_TOKEN"),
    ],
)
def test_an_address_at_which_something_else_answers(
    tmp_path: Path, code: int, body: str, message: str
) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            if code == 302:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            with pytest.raises(BadInput, match=message):
                cluster.submit(folder_with_spec(tmp_path / "a"), address)
        finally:
            server.shutdown()
            thread.join()


def test_the_package_that_travels_is_this_one_and_whole(tmp_path: Path) -> None:
    parts = pack(tmp_path)
    for room in ROOMS:
        here = {p.name for p in (ROOT / room).glob("*.py")}
        assert {p.name for p in (parts[0] / room).glob("*.py")} == here
    code = (
        "import importlib.metadata, flyweight.search.spec as s; "
        "print(s.__file__, importlib.metadata.version('flyweight'))"
    )
    # As on a cluster without flyweight: the path of a job alone, and no installed packages of ours.
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd="/"
    )
    file, number = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert number == importlib.metadata.version("flyweight")


def test_the_cluster_file_is_one_that_rays_launcher_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"]["CPU"] == 0  # no trials on the head
    assert kinds["trials"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert kinds["trials"]["resources"]["GPU"] >= 1
    assert kinds["target"]["resources"] == {"CPU": 0, "target": 1}
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in (c for c in starts if "ray start" in c):
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_AUTH_TOKEN_PATH=" in command
    head = next(c for c in starts if "--head" in c)
    assert "--dashboard-host=127.0.0.1" in head
    assert any("constraints.txt" in c for c in config["setup_commands"])
    assert "TOKEN" not in str(config["file_mounts"].keys())


def names(requirements: Iterable[str]) -> set[str]:
    """Names with their extras, without versions: "ray[default,tune]"."""
    return {re.split(r"[<>=;\s]", each)[0].lower() for each in requirements}


def test_the_cluster_file_installs_what_the_package_needs() -> None:
    """The set-up's list is written out, so that the file works without the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (install,) = [c for c in config["setup_commands"] if "pip install" in c]
    words = shlex.split(install.partition("constraints.txt")[2])
    assert names(words) == names(project["dependencies"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    plain = {name.partition("[")[0] for name in names(words)}
    assert plain <= names(lines)  # every version is one that was tested


def test_who_asks_for_no_job_means_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no job was submitted from here"):
        cluster.job_of(None, None)
    with pytest.raises(BadInput, match="give --address"):
        cluster.job_of("a job", None)
    remember(cluster.LAST_JOB, {"job": "last", "address": "http://there:8265"})
    assert cluster.job_of(None, None) == ("last", "http://there:8265")
    assert cluster.job_of(None, "http://given") == ("last", "http://given")
    assert cluster.job_of("other", None) == ("other", "http://there:8265")
    monkeypatch.setenv("RAY_ADDRESS", "http://of-ray")  # where its own tools would ask
    assert cluster.job_of("other", None) == ("other", "http://of-ray")
    assert cluster.job_of(None, None) == ("last", "http://there:8265")  # that job is there
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first")
    assert cluster.job_of("other", None) == ("other", "http://first")
    assert cluster.address_of("http://given") == "http://given"


def test_a_password_in_an_address_is_not_remembered(tmp_path: Path) -> None:
    remember(cluster.LAST_JOB, {"job": "last", "address": "http://me:secret@there:8265"})
    (kept,) = (tmp_path / "state").rglob("*.json")
    assert "secret" not in kept.read_text()
    assert cluster.job_of(None, "http://given") == ("last", "http://given")
    with pytest.raises(BadInput, match="give --address"):
        cluster.job_of(None, None)
    kept.write_text("damaged")
    with pytest.raises(BadInput, match="no job was submitted from here"):
        cluster.job_of(None, "http://given")


def test_the_rayjob_of_the_docs_is_whole() -> None:
    """As far as can be seen without a Kubernetes: its parts, and the command that it runs."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "RayJob" in b]
    job = yaml.safe_load(block)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    ray_cluster = job["spec"]["rayClusterSpec"]
    assert ray_cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={ray_cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text()
    head, workers = ray_cluster["headGroupSpec"], ray_cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"  # no trials on the head
    by_name = {group["groupName"]: group for group in workers}
    target = by_name["target"]
    assert json.loads(json.loads(target["rayStartParams"]["resources"])) == {"target": 1}
    assert target["rayStartParams"]["num-cpus"] == "0"
    assert (target["minReplicas"], target["maxReplicas"]) == (1, 1)
    assert "nvidia.com/gpu" in str(by_name["trials"]["template"])
    (container,) = head["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    (volume,) = head["template"]["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "flyweight"
    assert words[0] == "search"
    search = main.commands["search"].make_context("search", words[1:], resilient_parsing=True)
    assert search.params["out"].is_relative_to(mount["mountPath"])  # it outlives the pod
    assert search.params["address"] == "auto"
    assert search.params["wait"] > 0


# From here on a real head.


@pytest.fixture(scope="module")
def head(load: Callable[[str], ModuleType]) -> Iterator[str]:
    """The address of a Ray head that asks for TOKEN."""
    with load("tests/ray_nodes.py").Nodes(TOKEN, num_cpus=2) as nodes:
        yield nodes.dashboard


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return folder_with_spec(tmp_path / "a search")


def run(spec: Path, address: str, *command: str) -> tuple[str, str]:
    """How a job ends, and what it wrote."""
    job = cluster.submit(spec, address, entrypoint=" ".join(command))
    text = "".join(cluster.logs(job, address))
    return ended(job, address), text


@pytest.mark.slow
def test_without_the_token_nothing_is_done(
    head: str, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="asks for a token, so that nobody else can run code on it"):
        cluster.submit(spec, head, entrypoint="true")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    for refused in (
        lambda: cluster.submit(spec, head, entrypoint="true"),
        lambda: cluster.status("any", head),
        lambda: next(cluster.logs("any", head)),
        lambda: cluster.stop("any", head),
    ):
        with pytest.raises(BadInput, match="the token is not this cluster's") as caught:
            refused()
        assert "0" * 64 not in str(caught.value)


@pytest.mark.slow
def test_a_job_takes_folder_and_package_along(
    head: str, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # would win over --address
    (spec.parent / ".gitignore").write_text("weights.bin\n")
    (spec.parent / "weights.bin").write_text("what git ignores\n")
    (spec.parent / "runs").mkdir()
    (spec.parent / "runs" / "old").write_text("")
    (spec.parent / "job.py").write_text(
        "import importlib.metadata, os, flyweight.search.spec as s\n"
        "print(sorted(os.listdir()))\n"
        "print(s.__file__)\n"
        "print(importlib.metadata.version('flyweight'))\n"
    )
    state, text = run(spec, head, "python", "job.py")
    assert state == "SUCCEEDED", text
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    listing, file, number = text.splitlines()[-3:]
    assert "weights.bin" in listing
    assert "runs" not in listing
    assert "py_modules_files" in file
    assert number == importlib.metadata.version("flyweight")
    job, address = cluster.job_of(None, None)  # remembered
    assert address == head
    assert cluster.last_line(job, head) == number
    state, text = run(spec, head, "sh -c 'echo no; exit 3'")
    assert state.startswith("FAILED: ")
    assert "exit code 3" in state
    with pytest.raises(BadInput, match="no job 'unknown' at"):
        cluster.status("unknown", head)


@pytest.mark.slow
def test_a_stopped_job_is_given_time_to_finish(
    head: str, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    (spec.parent / "job.py").write_text(
        "import time\n"
        "try:\n"
        "    print('at work', flush=True)\n"
        "    time.sleep(300)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(5)\n"  # longer than Ray waits by itself
        "    print('the best so far', flush=True)\n"
    )
    job = cluster.submit(spec, head, entrypoint="python job.py")
    client = JobSubmissionClient(head, headers={"Authorization": f"Bearer {TOKEN}"})
    # Not from the stream: on a busy machine Ray may not tell the first line before the job's end.
    while "at work" not in client.get_job_logs(job):
        assert cluster.status(job, head) in ("PENDING", "RUNNING")
        time.sleep(0.5)
    assert cluster.stop(job, head)
    assert ended(job, head) == "STOPPED"
    # Read anew: on a busy machine Ray ends a stream at the job's end before its last line.
    assert "the best so far" in "".join(cluster.logs(job, head))
    assert not cluster.stop(job, head)


@pytest.mark.slow
def test_a_real_search_runs_as_a_job(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The starter of ``flyweight init``, cut short; its run directory is where it was asked for."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    starter = [str(Path(sys.executable).parent / "flyweight"), "init", str(tmp_path / "own")]
    subprocess.run(starter, check=True, capture_output=True)
    spec = tmp_path / "own" / "search.yaml"
    values = yaml.safe_load(spec.read_text()) | {
        "objective": {"max_drop": 60.0}, "tracking": None,
        "search": {"trials": 2, "concurrency": 1}, "rungs": {"full_epochs": 0.5},
    }  # fmt: skip
    spec.write_text(yaml.safe_dump(values))
    job = cluster.submit(spec, head, out=str(tmp_path / "run of it"))
    text = "".join(cluster.logs(job, head))
    result = tmp_path / "run of it" / "result.json"
    assert result.is_file(), text
    assert json.loads(result.read_text())["trials"]["full"] >= 1, text
    assert ended(job, head) == "SUCCEEDED", text
    done = CliRunner().invoke(main, ["status"])
    assert done.output.startswith("SUCCEEDED\nBest: "), done.output


def ended(job: str, address: str) -> str:
    """How the job ended; its log is whole a moment before that is known."""
    deadline = time.monotonic() + 30
    while cluster.status(job, address) == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    return cluster.status(job, address)
