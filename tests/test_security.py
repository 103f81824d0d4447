"""What listens while a command runs, and that none of it takes work from who has no token."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

pytestmark = pytest.mark.slow

RUN = "from flyweight.search.cli import main; main()"
LISTENS = "0A"  # the state of a socket in /proc/net/tcp
# A call of each of Ray's services: jobs, leases, tasks, objects, keys, nodes, logs, stacks, events.
CALLS = (
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVGet",
    "/ray.rpc.NodeInfoGcsService/GetClusterId",
    "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.SubscriberService/PubsubCommandBatch",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.LogService/ListLogs",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.events.EventAggregatorService/AddEvents",
)
REFUSALS = {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}  # the last: it is no gRPC


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starter") / "digits"
    subprocess.run([sys.executable, "-c", RUN, "init", str(folder)], check=True)
    values = yaml.safe_load((folder / "search.yaml").read_text()) | {
        "search": {"trials": 500, "concurrency": 1, "strategy": "random"},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}, "objective": {"max_drop": 90},
    }  # fmt: skip
    (folder / "search.yaml").write_text(yaml.safe_dump(values))
    return folder


@contextmanager
def running(*words: Any, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, words)], cwd=cwd, env=env, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(done: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while not done():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


def family(pid: int) -> set[int]:
    """A process and what it started, also what has another parent by now: the same session."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = place.read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid:
                found.add(int(place.parent.name))
    assert pid in found
    return found | {child for parent in found for child in children(parent)}


def children(pid: int) -> set[int]:
    found = set()
    for place in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, place.read_text().split()):
                found |= {child, *children(child)}
    return found


def listening(pids: set[int]) -> dict[int, tuple[bool, str]]:
    """Ports on which ``pids`` listen: whether beyond this machine, and the name of the process."""
    owner = {}
    for pid in pids:
        with suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    owner[os.readlink(handle)] = name
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].rpartition(":")
            if fields[3] == LISTENS and (name := owner.get(f"socket:[{fields[9]}]")):
                loopback = address in ("0100007F", "00000000000000000000000001000000")
                found[int(port, 16)] = not loopback, name
    return found


def tokens(pids: set[int]) -> set[str]:
    """Ray's token as processes have it in their environment; the driver drew it itself."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for part in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if part.startswith(b"RAY_AUTH_TOKEN="):
                    found.add(part.partition(b"=")[2].decode())
    return found


def answers(port: int, token: str | None) -> set[str]:
    """What comes of calls of Ray's services at ``port``: names of gRPC's codes."""
    codes = set()
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name in CALLS:
            call = channel.unary_unary(name)
            try:
                call(b"", timeout=15, metadata=metadata)
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)
    return codes


def http(port: int) -> str:
    """What a plain HTTP request for the jobs gets: the status, or "metrics" where the answer is
    Prometheus's, whatever is asked for; empty if it is not HTTP that is spoken."""
    answer = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 3) as connection:
        connection.sendall(
            b"GET /api/jobs/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        connection.settimeout(10)
        while len(answer) < 4096 and (more := connection.recv(4096)):
            answer += more
    if not answer.startswith(b"HTTP/1."):
        return ""
    head, _, body = answer.partition(b"\r\n\r\n")
    return "metrics" if body.lstrip().startswith(b"# HELP") else head.split()[1].decode()


def test_nothing_beyond_this_machine_takes_work_without_a_token(
    starter: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    record = run / "record.jsonl"
    with running("search", starter / "search.yaml", "--out", run, cwd=tmp_path) as process:
        wait_for(lambda: record.exists() and '"result"' in record.read_text(), process, log)
        pids = family(process.pid)
        (token,) = tokens(pids)
        ports = listening(pids)
        beyond = {port: name for port, (out, name) in ports.items() if out}
        assert beyond  # Ray's own: were they on loopback alone, this test would be about nothing
        without = {port: answers(port, None) for port in beyond}
        web = {port: http(port) for port in beyond}
        with_it = {port: answers(port, token) for port in beyond}
        everything = log.read_text() + "".join(
            p.read_text() for p in run.rglob("*") if p.suffix in (".json", ".jsonl", ".yaml")
        )
    told = "\n".join(f"{p}: {beyond[p], without[p], web[p], with_it[p]}" for p in beyond)
    for port in beyond:
        assert without[port] <= REFUSALS, told
        assert without[port] != {"UNIMPLEMENTED"}, f"an unknown service at {port}:\n{told}"
        assert web[port] in ("", "401", "403", "404", "metrics"), told
    # It is the token that makes the difference.
    assert any("UNAUTHENTICATED" in without[p] - with_it[p] for p in beyond), told
    assert token not in everything


def test_a_profile_listens_nowhere(starter: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.jsonl"
    words = ("profile", "--spec", starter / "search.yaml", "-o", out, "--networks", 200)
    with running(*words, cwd=tmp_path) as process:
        wait_for(
            lambda: out.exists() and len(out.read_text().splitlines()) > 1, process,
            tmp_path / "log",
        )  # fmt: skip
        assert listening(family(process.pid)) == {}
        assert json.loads(out.read_text().splitlines()[0])["fingerprint"]
