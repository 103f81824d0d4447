"""A real Ray cluster on this machine: a head and further nodes, each its own ``ray start``, that
ask for a token. Its processes end with the test, no others."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from flyweight.search import cluster
from flyweight.spaces import BadInput

SCRIPTS = Path(sys.executable).parent
PORTS = (
    "object-manager-port", "node-manager-port", "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
)  # fmt: skip
HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")
START_S = 120


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Nodes:
    """A context manager. dashboard: where jobs are submitted; gcs: what drivers connect to."""

    def __init__(self, token: str, **head: Any) -> None:
        self.token, self._head = token, head
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        # Short: the path of a socket has at most 107 bytes.
        self._home = tempfile.mkdtemp(prefix="fw", dir="/tmp")
        ports = dict(zip(HEAD_PORTS, free_ports(len(HEAD_PORTS)), strict=True))
        self.dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.gcs = f"127.0.0.1:{ports['port']}"
        try:
            words = ("--head", "--dashboard-host=127.0.0.1", f"--temp-dir={self._home}")
            self._start(*words, *(f"--{name}={port}" for name, port in ports.items()), **self._head)
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends every node and whatever it started: all have ``_home`` in their environment."""
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        mark = f"HOME={self._home}\0".encode()
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in place.read_bytes():
                    os.kill(int(place.parent.name), signal.SIGKILL)
        for process in self._started:
            process.wait(20)
        shutil.rmtree(self._home, ignore_errors=True)

    def add(self, **how: Any) -> subprocess.Popen[bytes]:
        """Another node, once it is there; how: the options of ``ray start``, "num_cpus" or
        "resources". Ray gives a node 30 s, which is little on a busy machine: then again."""
        for _ in range(6):
            process = self._start(f"--address={self.gcs}", **how)
            log = Path(self._home) / f"node-{len(self._started)}.log"
            while process.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return process
                time.sleep(0.2)
        raise AssertionError(self.log())

    def environment(self) -> dict[str, str]:
        """Of a driver."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def log(self) -> str:
        """What ``ray start`` wrote, of all nodes."""
        return "".join(place.read_text() for place in Path(self._home).glob("node-*.log"))

    def _start(self, *words: str, **how: Any) -> subprocess.Popen[bytes]:
        options = {"num_gpus": 0, "object_store_memory": 100_000_000} | how
        options |= dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        command = [
            str(SCRIPTS / "ray"), "start", "--block", "--node-ip-address=127.0.0.1",
            "--disable-usage-stats", *words,
            *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()),
        ]  # fmt: skip
        env = self.environment() | {
            "HOME": self._home, "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        }  # fmt: skip
        with open(Path(self._home) / f"node-{len(self._started) + 1}.log", "w") as log:
            process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=self._home
            )
        self._started.append(process)
        return process

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                return cluster.check(self.dashboard, {"Authorization": f"Bearer {self.token}"})
            except BadInput:
                assert self._started[0].poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(1)
