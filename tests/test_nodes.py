"""A search over several real Ray nodes: where trials run, where it measures, what is refused."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

TOKEN = "5" * 64
RUN = "from flyweight.search.cli import main; main()"
ASK = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
until = time.monotonic() + 240
while True:
    known = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
    if len(known) >= int(sys.argv[2]) or time.monotonic() > until:
        break
    time.sleep(0.5)
print("NODES", json.dumps(known))
"""


@pytest.fixture(scope="module")
def nodes(load: Callable[[str], ModuleType]) -> Iterator[Any]:
    """A head without trials, two nodes that run them, and one to measure on."""
    with load("tests/ray_nodes.py").Nodes(TOKEN, num_cpus=0) as found:
        for _ in range(2):
            found.add(num_cpus=1)
        found.add(num_cpus=0, resources='{"target": 1}')
        assert len(known := alive(found, 4)) == 4, (known, found.log())
        yield found


def alive(nodes: Any, least: int) -> dict[str, dict[str, float]]:
    """The resources of the nodes of the cluster, by their ids, once there are ``least``."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, nodes.gcs, str(least)], env=nodes.environment(),
        capture_output=True, text=True, check=True, cwd="/tmp",
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NODES ")]
    return dict(json.loads(line.removeprefix("NODES ")))


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starter") / "digits"
    done = subprocess.run([sys.executable, "-c", RUN, "init", str(folder)], capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def spec(folder: Path, name: str, **changes: Any) -> Path:
    values = yaml.safe_load((folder / "search.yaml").read_text()) | {
        "objective": {"max_drop": 60.0}, "tracking": None,
        "search": {"trials": 4, "concurrency": 2}, "rungs": {"full_epochs": 0.5},
    }  # fmt: skip
    (folder / name).write_text(yaml.safe_dump(values | changes))
    return folder / name


def search(nodes: Any, path: Path, run: Path, *words: str, **env: str) -> Any:
    command = [sys.executable, "-c", RUN, "search", path, "--out", run, "--address", nodes.gcs]
    return subprocess.run(
        [*map(str, command), *words], env=nodes.environment() | env, capture_output=True, text=True,
        cwd=path.parent, timeout=600, check=False,
    )  # fmt: skip


def entries(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "record.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["kind"] == kind]


def test_trials_run_on_the_workers_and_the_target_measures(
    nodes: Any, starter: Path, tmp_path: Path
) -> None:
    by_id = alive(nodes, 4)
    (target,) = [node for node, has in by_id.items() if has.get("target")]
    workers = {node for node, has in by_id.items() if has.get("CPU")}
    run = tmp_path / "run"
    done = search(nodes, spec(starter, "placed.yaml"), run)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Checking 2 nodes" in done.stdout
    assert {e["node"] for e in entries(run, "result")} <= workers
    (begin,) = entries(run, "search")
    assert begin["target_node"] == target
    measured = entries(run, "measured")
    assert measured
    assert {e["node"] for e in measured} == {target}
    front = json.loads((run / "result.json").read_text())["front"]
    assert all(row["latency_spread"] is not None for row in front)
    assert not (run / "reached").exists()


REFUSED = [
    (
        {"resources": {"gpus": 0.5, "accelerator": "H100", "memory_bytes": 10**15}},
        "a trial asks for 1 CPUs, 0.5 GPUs, 1,000,000 GB of memory, a GPU of type H100, but no "
        "node has that; there is ",
    ),
    ({"task": "absent.py:Lonely"}, "no_such_package"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_the_nodes_lack_is_refused_before_any_cost(
    nodes: Any, starter: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    # The driver has the package, the nodes have not.
    (starter / "absent.py").write_text(
        "import os\nif 'HERE' not in os.environ:\n    import no_such_package\n"
        "from task import Digits\n\n\nclass Lonely(Digits): ...\n"
    )
    run = tmp_path / "run"
    done = search(nodes, spec(starter, "refused.yaml", **changes), run, HERE="1")
    assert done.returncode == 2, done.stderr + done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "resources" in changes:
        assert "x (1 CPUs and " in done.stderr  # what there is
        assert "--wait 20m" in done.stderr
    assert not (run / "record.jsonl").exists()


def test_a_run_directory_that_workers_cannot_write(
    nodes: Any, starter: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "reached").write_text("a file where a folder should be")  # root may write anywhere
    done = search(nodes, spec(starter, "unwritable.yaml"), run)
    assert done.returncode == 2, done.stderr + done.stdout
    assert "cannot write what a trial makes" in done.stderr


def test_a_wrong_token_is_refused(nodes: Any, starter: Path, tmp_path: Path) -> None:
    path = spec(starter, "token.yaml")
    done = search(nodes, path, tmp_path / "run", RAY_AUTH_TOKEN="6" * 64)
    assert done.returncode == 2, done.stderr + done.stdout
    assert "token" in done.stderr
    assert "6" * 64 not in done.stderr + done.stdout


def test_a_node_that_is_waited_for_comes(nodes: Any, starter: Path, tmp_path: Path) -> None:
    search_ = {"trials": 1, "concurrency": 1}
    resources = {"gpus": 0.5, "accelerator": "T4"}
    path = spec(starter, "waits.yaml", resources=resources, search=search_)
    command = [sys.executable, "-c", RUN, "search", path, "--out", tmp_path / "run",
               "--address", nodes.gcs, "--wait", "5m"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=nodes.environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=log, stderr=log, cwd=starter,
        )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while "Waiting for a node with" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.5)
        node = nodes.add(num_cpus=1, num_gpus=1, resources='{"accelerator_type:T4": 1}')
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
    assert node.poll() is None
    gpu = {n for n, has in alive(nodes, 5).items() if has.get("GPU")}
    assert {e["node"] for e in entries(tmp_path / "run", "result")} == gpu


def test_without_a_target_node_latency_is_predicted_until_it_is_measured(
    load: Callable[[str], ModuleType], starter: Path, tmp_path: Path
) -> None:
    path, run = (
        spec(starter, "nowhere.yaml", search={"trials": 1, "concurrency": 1}),
        tmp_path / "r",
    )
    with load("tests/ray_nodes.py").Nodes(TOKEN, num_cpus=1) as nodes:
        done = search(nodes, path, run)
    assert done.returncode == 0, done.stderr + done.stdout
    said = " ".join(done.stdout.split())
    assert "No node of this cluster carries the resource 'target'" in said
    assert f"flyweight measure {run}" in said
    assert "predicted, not measured" in said
    assert not entries(run, "measured")
    (row,) = json.loads((run / "result.json").read_text())["front"]
    assert row["latency_spread"] is None
    fetched = tmp_path / "fetched"
    os.rename(run, fetched)
    done = subprocess.run(
        [sys.executable, "-c", RUN, "measure", str(fetched)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((fetched / "result.json").read_text())["front"]
    assert row["latency_spread"] is not None
    assert len(entries(fetched, "measured")) == 1
