"""Real services that can be killed and come back: MLflow's server, Postgres, nodes of a cluster."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 400.0  # until a service must answer, on a busy machine


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


class Service:
    """A command with all it starts: what carries its mark in the environment."""

    def __init__(self, folder: Path, name: str) -> None:
        self.mark = f"FLYWEIGHT_SERVICE={name}-{secrets.token_hex(4)}"
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self, command: list[str], **environment: str) -> None:
        name, _, value = self.mark.partition("=")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd="/",
                env=os.environ | {name: value} | environment,
            )  # fmt: skip

    def await_port(self, port: int, host: str = "127.0.0.1") -> None:
        until = time.monotonic() + PATIENCE_S
        while not answers(port, host):
            if time.monotonic() > until or (self.process and self.process.poll() is not None):
                raise RuntimeError(f"{self.mark}: {self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def processes(self) -> list[int]:
        """The ids of all its processes."""
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in place.read_bytes():
                    found.append(int(place.parent.name))
        return found

    def signal(self, what: signal.Signals) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def kill(self) -> None:
        """SIGKILL to all of it."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self.process = None
        self.signal(signal.SIGKILL)  # what was just being started


class MlflowServer(Service):
    """On loopback; backend: where its runs are kept."""

    def __init__(self, folder: Path, backend: str | None = None) -> None:
        super().__init__(folder, "mlflow")
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1",
            "--port", str(self.port), "--artifacts-destination", str(folder / "artifacts"),
            "--backend-store-uri", backend or f"sqlite:///{folder}/mlflow.db",
        ]  # fmt: skip

    def start(self) -> None:
        self.begin(self.command, MLFLOW_DISABLE_TELEMETRY="true")
        self.await_port(self.port)


class Postgres(Service):
    """A database server of its own on loopback, which only this user's processes may enter."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "postgres")
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        self.programs = programs[-1].parent
        self.port = free_port()
        # It refuses to run as root, and its folder must be its user's.
        self.user = "postgres" if os.geteuid() == 0 else ""
        self.data = Path(subprocess.run(
            [*self._as(), "mktemp", "-d", "/tmp/flyweight-pg-XXXXXX"],
            check=True, capture_output=True, text=True, cwd="/",
        ).stdout.strip())  # fmt: skip
        self._run("initdb", "-D", str(self.data), "-A", "trust", "-U", "flyweight", "-N")
        self.uri = f"postgresql+psycopg2://flyweight@127.0.0.1:{self.port}/mlflow"

    @staticmethod
    def missing() -> str | None:
        """What this machine lacks for one; None if nothing."""
        if not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
            return "no Postgres here: apt-get install postgresql"
        try:
            import psycopg2  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
        except ImportError:
            return "no driver of Postgres here: pip install psycopg2-binary"
        return None

    def _as(self) -> list[str]:
        return ["runuser", "-u", self.user, "--"] if self.user else []

    def _run(self, program: str, *words: str) -> None:
        command = [*self._as(), str(self.programs / program), *words]
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    def start(self) -> None:
        words = ["-D", str(self.data), "-p", str(self.port), "-h", "127.0.0.1", "-k", ""]
        self.begin([*self._as(), str(self.programs / "postgres"), *words])
        self.await_port(self.port)

    def create(self) -> None:
        words = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "flyweight", "mlflow"]
        self._run("createdb", *words)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.data, ignore_errors=True)


class Node(Service):
    """One node of a Ray cluster on this machine: ``ray start``, with a network of its own where
    that is allowed (root)."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        super().__init__(cluster.folder, f"node{number}")
        self.cluster, self.number = cluster, number
        self.network = f"fw{cluster.tag}n{number}"
        self.host = f"10.231.{cluster.subnet}.{number + 1}" if cluster.isolated else "127.0.0.1"

    def start(self, *words: str) -> None:
        head = self.number == 0
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats",
            f"--node-ip-address={self.host}", "--object-store-memory=100000000",
            "--num-gpus=0", *words,
        ]  # fmt: skip
        if head:
            command += ["--head", f"--port={self.cluster.port}", "--include-dashboard=false"]
            command += [f"--temp-dir={self.cluster.scratch}"]
        else:
            command += [f"--address={self.cluster.address}"]
            if self.cluster.isolated:
                self._connect()
                # With a scratch folder of its own too: Ray keeps a machine's address there.
                script = f'mount -t tmpfs tmpfs {self.cluster.scratch} && exec "$@"'
                command = ["ip", "netns", "exec", self.network, "sh", "-c", script, "sh", *command]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.begin(command, PATH=path, HOME=str(self.cluster.scratch))
        self._await_start()

    def _await_start(self) -> None:
        """One after another: many that start at once wait for each other until they give up."""
        until = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in self.log.read_text():
            if self.process is None or self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.mark}: {self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def _connect(self) -> None:
        bridge, near, far = self.cluster.bridge, f"{self.network}a", f"{self.network}b"
        for words in (
            f"netns add {self.network}",
            f"link add {near} type veth peer name {far} netns {self.network}",
            f"link set {near} master {bridge} up",
            f"-n {self.network} addr add {self.host}/24 dev {far}",
            f"-n {self.network} link set {far} up",
            f"-n {self.network} link set lo up",
        ):
            ip(words)

    def cut(self) -> None:
        """Off the network; its processes go on. Without a network of its own they are stopped."""
        if self.cluster.isolated:
            ip(f"link set {self.network}a down")
        else:
            self.signal(signal.SIGSTOP)

    def mend(self) -> None:
        if self.cluster.isolated:
            ip(f"link set {self.network}a up")
        else:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        super().kill()
        if self.cluster.isolated and self.number:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(f"netns del {self.network}")


class Cluster:
    """A head without trials and nodes with them, all behind a token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = Path(f"/tmp/fw{secrets.token_hex(3)}")  # sockets have short paths
        self.scratch.mkdir()
        self.tag = secrets.token_hex(2)
        self.subnet = secrets.randbelow(250) + 1
        self.bridge = f"fw{self.tag}"
        self.isolated = can_isolate()
        if self.isolated:
            ip(f"link add {self.bridge} type bridge")
            ip(f"addr add 10.231.{self.subnet}.1/24 dev {self.bridge}")
            ip(f"link set {self.bridge} up")
        self.port = free_port()
        self.token = secrets.token_hex(32)
        self.nodes: list[Node] = []
        self.head = Node(self, 0)
        self.address = f"{self.head.host}:{self.port}"
        self._made = 0

    @property
    def environment(self) -> dict[str, str]:
        """What a process that uses it needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, nodes: int, cpus: int) -> None:
        os.environ.update(self.environment)
        self.head.start("--num-cpus=0")
        for _ in range(nodes):
            self.add(cpus)

    def add(self, cpus: int) -> Node:
        self._made += 1
        node = Node(self, self._made)
        node.start(f"--num-cpus={cpus}")
        self.nodes.append(node)
        return node

    def stop(self) -> None:
        for node in [*self.nodes, self.head]:
            node.kill()
        if self.isolated:
            ip(f"link del {self.bridge}")
        shutil.rmtree(self.scratch, ignore_errors=True)


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def can_isolate() -> bool:
    """Whether network namespaces can be made here."""
    name = f"fwtest{os.getpid()}"
    try:
        ip(f"netns add {name}")
        ip(f"netns del {name}")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def descendants(pid: int) -> list[int]:
    """The processes under ``pid``, whatever session they are in."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(place.read_text().rpartition(")")[2].split()[1]), []).append(
                int(place.parent.name)
            )
    found, left = [], [pid]
    while left:
        for child in children.get(left.pop(), []):
            found.append(child)
            left.append(child)
    return found


def alive(pids: list[int]) -> list[int]:
    """Those of ``pids`` that run; one that nobody has waited for is dead all the same."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state: Any = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found.append(pid)
    return found


def command_of(pid: int) -> str:
    """How the process was called; empty if it ended."""
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    return ""
