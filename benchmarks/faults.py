"""Nothing is lost: a search whose driver, workers, tracker, disk or network fail.

    python benchmarks/faults.py [drivers] [workers] [server] [database] [disk] [searches] [--short]

drivers   real searches of the starter task (`flyweight search`) killed at random moments, each time
          gone on with by --resume
workers   no-op trials on a cluster of `ray start` nodes, a third of which are killed again and
          again and replaced, and one is cut off from the network for a minute
server    MLflow's server is away for the first half of the trials, and killed again later
database  the same with its runs on Postgres, which is restarted too
disk      a real search whose run directory is full, and one whose storage is, where its workers
          write; each is gone on with once there is room
searches  eight searches at once on one cluster and one MLflow server

Network namespaces and small disks need root: without, a node is stopped instead (SIGSTOP), and disk
is left out, as is database without Postgres. What was found is written to
benchmarks/out/faults-*.json.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import write
from no_op import make_controller, no_op
from services import Cluster, MlflowServer, Postgres, alive, command_of, descendants

CLI = "from flyweight.search.cli import main; main()"
PATIENCE_S = 900.0


# A search of no-op trials, in a process of its own that can be killed.


def drive(job: dict[str, Any]) -> dict[str, Any]:
    """Runs or goes on with the search in ``job["folder"]``; what its thread had to wait for."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    from flyweight.search.record import FileRecord
    from flyweight.search.tracking import MemoryTracker
    from flyweight.search.tracking_process import TrackerProcess
    from flyweight.search.tuning import run_trials

    folder = Path(job["folder"])
    record = FileRecord(folder / "record.jsonl")
    header = next(iter(record.entries()), None) or _header(job["name"])
    record.append({**header, "time": time.time()})
    tracker: Any = MemoryTracker()
    if job["uri"]:
        place = (job["uri"], job["experiment"], None, job["name"])
        tracker = TrackerProcess(*place, folder)
    waits: list[float] = []
    held: list[int] = []  # bytes of memory, at each end of a trial

    def listen(entry: dict[str, Any]) -> None:
        if entry["kind"] in ("search", "result", "end"):
            began = time.perf_counter()
            tracker.record(entry)
            waits.append(time.perf_counter() - began)
        if entry["kind"] == "end":
            held.append(resident())

    for entry in record.entries():
        listen(entry)
    waits.clear()
    held.clear()
    controller = make_controller(job["trials"], record, listen, job["sampler"])
    options = {"address": job["address"]} if job["address"] else {"num_cpus": job["concurrency"]}
    ray.init(log_to_driver=False, logging_level="ERROR", namespace=job["name"], **options)
    began = time.perf_counter()
    run_trials(
        controller, no_op(job["seconds"]), concurrency=job["concurrency"], resources={"cpu": 1.0}
    )
    took = time.perf_counter() - began
    ray.shutdown()
    began = time.perf_counter()
    missing = tracker.finish("FINISHED", timeout_s=job["finish_s"])
    record.close()
    first = len(held) // 5  # until then it imports, and its caches fill
    return {
        "grown_kb_a_trial": (held[-1] - held[first]) / 1e3 / max(len(held) - first, 1),
        "seconds": took, "finish_s": time.perf_counter() - began, "undelivered": missing.entries,
        "why": missing.reason, "longest_wait_ms": 1e3 * max(waits, default=0.0),
        "waits": len(waits), "asked": controller.proposals.running(),
    }  # fmt: skip


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _header(name: str) -> dict[str, Any]:
    """What opens the record of a search."""
    teacher = {"metric": 94.0, "metric_test": None, "latency_ms": 0.4, "size_bytes": 900_000}
    return {
        "kind": "search", "search_id": name, "flyweight": "0.1.0", "task": "no-op", "seed": 0,
        "target": {"runtime": "none", "threads": 1, "batch_size": 1, "fingerprint": "none"},
        "teacher": teacher, "versions": {}, "data_digest": "none",
    }  # fmt: skip


class Driver:
    """A process that drives a search of no-op trials."""

    def __init__(self, folder: Path, name: str, **job: Any) -> None:
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.job = {
            "folder": str(self.folder), "name": name, "trials": 100, "concurrency": 2,
            "seconds": 0.0, "sampler": "random", "uri": None, "experiment": "faults",
            "address": None, "finish_s": 300.0,
        } | job  # fmt: skip
        self.process = start_python(
            [str(Path(__file__).resolve()), "--job", json.dumps(self.job)], self.folder
        )

    def wait(self) -> dict[str, Any]:
        if self.process.wait(PATIENCE_S):
            raise RuntimeError((self.folder / "log").read_text()[-3000:])
        found: dict[str, Any] = json.loads((self.folder / "answer.json").read_text())
        return found

    def count(self, kind: str) -> int:
        return sum(e["kind"] == kind for e in entries(self.folder))


_STARTED: list[subprocess.Popen[bytes]] = []


def start_python(words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        _STARTED.append(subprocess.Popen(
            [sys.executable, *words], stdout=log, stderr=log, start_new_session=True, cwd=folder
        ))  # fmt: skip
    return _STARTED[-1]


def entries(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a record that may still be written."""
    path = folder / "record.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError("it did not come to that")
        time.sleep(0.1)


# What must hold when all is over.


def judge_record(folder: Path, trials: int) -> dict[str, Any]:
    """What the record of a finished search says about trials that were lost or had twice."""
    found = entries(folder)
    begun = Counter(e["trial"] for e in found if e["kind"] == "begin")
    digests = Counter(e["digest"] for e in found if e["kind"] == "begin")
    rungs = Counter((e["trial"], e["rung"]) for e in found if e["kind"] == "result")
    after, ends, ended = 0, [], Counter[int]()
    reasons: dict[int, str] = {}
    for entry in found:
        if entry["kind"] == "end" and entry["reason"] != "interrupted":
            ends.append(entry)
            ended[entry["trial"]] += 1
            reasons[entry["trial"]] = entry["reason"]
        elif entry["kind"] == "again" and reasons.pop(entry["trial"], None) == "stopped":
            ended[entry["trial"]] -= 1  # it goes on: that was no end
        after += entry["kind"] == "result" and ended[entry["trial"]] > 0
    ended = +ended
    return {
        "trials": len(begun), "lost": trials - len(ended),
        "never_ended": len(set(begun) - set(ended)),
        "ended_twice": sum(n > 1 for n in ended.values()), "results_after_the_end": after,
        "policies_twice": sum(n > 1 for n in digests.values()),
        "rungs_twice": sum(n > 1 for n in rungs.values()), "results": len(rungs),
        "workers_died": sum(e["kind"] == "died" for e in found),
        "failed": dict(Counter(str(e["error"])[:60] for e in ends if e["reason"] == "failed")),
        "sessions": sum(e["kind"] == "search" for e in found),
    }  # fmt: skip


def judge_mlflow(uri: str, folder: Path, name: str) -> dict[str, Any]:
    """What MLflow holds beside the record: runs that lack, that are there twice, that still run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = entries(folder)
    experiments = [e.experiment_id for e in client.search_experiments()]
    parents = client.search_runs(experiments, f"tags.`flyweight.search` = '{name}'")
    children: list[Any] = []
    for parent in parents:
        token = None
        while True:
            condition = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
            page = client.search_runs(experiments, condition, max_results=1000, page_token=token)
            children += page
            if not (token := page.token):
                break
    numbers = Counter(run.data.tags["flyweight.trial"] for run in children)
    known = {f"{name}/{e['trial']}" for e in found if e["kind"] in ("result", "end")}
    highest = {f"{name}/{e['trial']}": e["loss"] for e in found if e["kind"] == "result"}
    wrong = [
        run for run in children
        if run.data.metrics.get("loss") != highest.get(run.data.tags["flyweight.trial"])
    ]  # fmt: skip
    return {
        "parents": len(parents), "runs": len(children), "lacking": len(known - set(numbers)),
        "foreign": len(set(numbers) - known), "duplicates": sum(n > 1 for n in numbers.values()),
        "still_running": sum(r.info.status == "RUNNING" for r in [*parents, *children]),
        "wrong_metrics": len(wrong),
    }  # fmt: skip


ZERO = (
    "lost", "never_ended", "ended_twice", "results_after_the_end", "policies_twice", "rungs_twice",
    "lacking", "foreign", "duplicates", "still_running", "wrong_metrics", "undelivered", "asked",
    "processes_left", "not_told",
)  # fmt: skip


def verdict(figures: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    wrong = [f"{name} = {figures[name]}" for name in ZERO if figures.get(name)]
    if figures.get("failed"):
        wrong.append(f"failed: {figures['failed']}")
    return wrong


# The faults.


def drivers(folder: Path, short: bool = False) -> dict[str, Any]:
    """A real search of the starter task, killed and gone on with."""
    kills, trials = (2, 6) if short else (10, 40)
    uri, run = f"sqlite:///{folder}/mlflow.db", folder / "run"
    path = _starter(folder, trials, tracking={"uri": uri, "experiment": "faults"})
    words = ["-c", CLI, "search", str(path), "--out", str(run)]
    rng, moments, left = random.Random(), [], []
    for _ in range(kills):
        resume = ["--resume"] if (run / "record.jsonl").exists() else []
        process = start_python([*words, *resume], folder / "driver")
        moment = rng.uniform(0.0, 1.0)
        moments.append(_kill_at(process, run, moment, left))
    began = time.monotonic()
    resume = ["--resume"] if (run / "record.jsonl").exists() else []
    process = start_python([*words, *resume], folder / "driver")
    if process.wait(PATIENCE_S):
        raise RuntimeError((folder / "driver" / "log").read_text()[-3000:])
    # MLflow's process delivers for 30 s at most; on a busy machine all takes longer.
    wait_until(lambda: not alive(left) or time.monotonic() - began > 120)
    figures = {
        "kills": kills, "moments": moments, "processes_left": len(alive(left)),
        "left": [command_of(pid) for pid in alive(left)], **judge_record(run, trials),
    }  # fmt: skip
    name = entries(run)[0]["search_id"]
    front = json.loads((run / "result.json").read_text())["front"]
    return figures | judge_mlflow(uri, run, name) | {"front": len(front)}


def _starter(folder: Path, trials: int, **changes: Any) -> Path:
    """The spec of a short search of the starter task."""
    import yaml

    words = ["-c", CLI, "init", str(folder / "digits")]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    path = folder / "digits" / "search.yaml"
    values = yaml.safe_load(path.read_text()) | {
        "objective": {"speedup": 1.1, "max_drop": 60},
        "search": {"trials": trials, "concurrency": 2, "strategy": "random"},
        "rungs": {"short": 0.5, "full_epochs": 3}, "tracking": None,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values | changes))
    return path


def _kill_at(
    process: subprocess.Popen[bytes], run: Path, share: float, left: list[int]
) -> dict[str, Any]:
    """Kills ``process`` alone at a random moment: one kill in four while it prepares, the others
    while trials run. What it leaves behind must end by itself."""
    before = len(entries(run))
    began = time.monotonic()
    if share < 0.25:
        time.sleep(40 * share)
    else:
        wait_until(lambda: len(entries(run)) > before + 1 or process.poll() is not None)
        time.sleep(10 * (share - 0.25))
    left += descendants(process.pid)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return {
        "after_s": round(time.monotonic() - began, 2), "it_had_ended": ended,
        "entries": len(entries(run)) - before,
    }  # fmt: skip


def workers(folder: Path, short: bool = False) -> dict[str, Any]:
    """Nodes that are killed, and one that is cut off."""
    count, trials, seconds, pause = (3, 40, 0.3, 4.0) if short else (6, 600, 0.5, 10.0)
    cut_s = 20.0 if short else 60.0
    cluster = Cluster(folder)
    killed, stop, rng = [0], threading.Event(), random.Random()
    try:
        cluster.start(count, cpus=2)
        job = {"trials": trials, "concurrency": 2 * count, "seconds": seconds}
        driver = Driver(folder, "workers", address=cluster.address, **job)
        wait_until(lambda: driver.count("result") > 5)
        off = cluster.nodes[0]
        off.cut()
        began = time.monotonic()

        def kill_again_and_again() -> None:
            while not stop.wait(pause):
                for node in rng.sample(cluster.nodes[1:], count // 3):
                    node.kill()
                    cluster.nodes.remove(node)
                    killed[0] += 1
                    cluster.add(cpus=2)

        killer = threading.Thread(target=kill_again_and_again)
        killer.start()
        try:
            wait_until(
                lambda: time.monotonic() - began > cut_s or driver.process.poll() is not None
            )
            still = driver.process.poll() is None
            off.mend()
            found = driver.wait()
        finally:
            stop.set()
            killer.join()
    finally:
        cluster.stop()
    return {
        "nodes": count, "killed": killed[0], "cut_off_s": cut_s, "isolated": cluster.isolated,
        "running_when_mended": still, **judge_record(driver.folder, trials), **found,
    }  # fmt: skip


def server(folder: Path, short: bool = False, postgres: Postgres | None = None) -> dict[str, Any]:
    """MLflow's server away for the first half, killed later, and its database restarted."""
    trials, seconds = (80, 0.1) if short else (400, 0.1)
    mlflow = MlflowServer(folder, postgres.uri if postgres else None)
    job = {"trials": trials, "concurrency": 4, "seconds": seconds, "uri": mlflow.uri}
    try:
        driver = Driver(folder, "server", **job)
        wait_until(lambda: driver.count("end") >= trials // 2)
        mlflow.start()
        wait_until(lambda: driver.count("end") >= trials * 5 // 8)
        mlflow.kill()
        wait_until(lambda: driver.count("end") >= trials * 6 // 8)
        mlflow.start()
        if postgres:
            wait_until(lambda: driver.count("end") >= trials * 7 // 8)
            postgres.kill()
            time.sleep(2.0)
            (postgres.data / "postmaster.pid").unlink(missing_ok=True)
            postgres.start()
        found = driver.wait()
        known = judge_mlflow(mlflow.uri, driver.folder, "server")
    finally:
        mlflow.kill()
    return {**judge_record(driver.folder, trials), **known, **found}


def database(folder: Path, short: bool = False) -> dict[str, Any]:
    """The same with MLflow's runs on Postgres."""
    postgres = Postgres(folder)
    try:
        postgres.start()
        postgres.create()
        return server(folder, short, postgres)
    finally:
        postgres.remove()


def disk(folder: Path, short: bool = False) -> dict[str, Any]:
    """A run directory that is full, and a storage that is. The latter takes minutes: workers wait
    half of one for room, and the search ends when eight results were not stored."""
    trials, places = (6, ["run"]) if short else (12, ["run", "storage"])
    found = {where: _full(folder / where, where, trials) for where in places}
    wrong = {name: sum(f.get(name, 0) for f in found.values()) for name in ZERO}
    return {**wrong, "failed": {k: f["failed"] for k, f in found.items() if f["failed"]}, **found}


def _full(folder: Path, where: str, trials: int) -> dict[str, Any]:
    small = folder / "small"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220m", "tmpfs", str(small)], check=True)
    try:
        run = (small if where == "run" else folder) / "a-run"
        storage = str(small) if where == "storage" else None
        path = _starter(folder, trials, storage=storage)
        words = ["-c", CLI, "search", str(path), "--out", str(run)]
        process = start_python(words, folder / "driver")
        wait_until(
            lambda: any(e["kind"] == "begin" for e in entries(run)) or process.poll() is not None
        )
        ballast = small / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
        code = process.wait(PATIENCE_S)
        log = (folder / "driver" / "log").read_text()
        said = " ".join(log.split())  # lines are broken at the width of a terminal
        known = len(entries(run))  # raises if the record is damaged
        ballast.unlink()
        again = start_python([*words, "--resume"], folder / "again")
        if again.wait(PATIENCE_S):
            raise RuntimeError((folder / "again" / "log").read_text()[-3000:])
        front = json.loads((run / "result.json").read_text())["front"]
        for row in front:
            place = run / row["artifact"]
            known_sha = json.loads(place.with_name("metrics.json").read_text())["sha256"]
            assert hashlib.sha256(place.read_bytes()).hexdigest() == known_sha
        return {
            "code": code, "entries_then": known, "front": len(front),
            "it_said": re.findall(r"[^.;]*No space left on device[^.;]*", said)[:3],
            "not_told": int(code != 1 or "No space left on device" not in said),
            **judge_record(run, trials),
        }  # fmt: skip
    finally:
        subprocess.run(["umount", str(small)], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        tried = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True)
        if tried.returncode == 0:
            subprocess.run(["umount", place], check=True)
    return tried.returncode == 0


def searches(folder: Path, short: bool = False) -> dict[str, Any]:
    """Several searches at once."""
    many, trials, seconds = (2, 20, 0.1) if short else (8, 60, 0.5)
    cluster = Cluster(folder)
    mlflow = MlflowServer(folder)
    try:
        cluster.start(nodes=2, cpus=many)
        mlflow.start()
        job = {"trials": trials, "concurrency": 4, "seconds": seconds}
        all_of_them = [
            Driver(folder, f"search{n}", address=cluster.address, uri=mlflow.uri, **job)
            for n in range(many)
        ]
        found = [driver.wait() for driver in all_of_them]
        each = [
            judge_record(d.folder, trials) | judge_mlflow(mlflow.uri, d.folder, d.job["name"])
            for d in all_of_them
        ]
    finally:
        mlflow.kill()
        cluster.stop()
    seconds_of = sorted(f["seconds"] for f in found)
    wrong = {name: sum(e.get(name, 0) for e in [*each, *found]) for name in ZERO}
    return {
        "searches": many, "trials_each": trials, "slots": 2 * many, "asked_for": 4 * many,
        "first_s": seconds_of[0], "last_s": seconds_of[-1], **wrong,
        "failed": [e["failed"] for e in each if e["failed"]],
        "longest_wait_ms": max(f["longest_wait_ms"] for f in found),
    }  # fmt: skip


FAULTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "drivers": drivers, "workers": workers, "server": server, "database": database, "disk": disk,
    "searches": searches,
}  # fmt: skip


def lacking(name: str) -> str | None:
    """What this machine lacks for a fault; None if nothing."""
    if name == "database":
        return Postgres.missing()
    if name == "disk" and not can_mount():
        return "no small disk can be mounted here: it needs root"
    return None


def suffer(name: str, folder: Path, short: bool) -> dict[str, Any]:
    """What came of a fault; ``wrong``: what is not as it must be. Of what was started nothing is
    left."""
    began = time.monotonic()
    try:
        figures = FAULTS[name](folder, short)
    finally:
        while _STARTED:
            process = _STARTED.pop()
            for pid in [*descendants(process.pid), process.pid] if process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    wall = round(time.monotonic() - began, 1)
    return figures | {"short": short, "wall_s": wall, "wrong": verdict(figures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)}; all without")
    parser.add_argument("--short", action="store_true", help="as the tests do it")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        answer = json.dumps(drive(job))
        (Path(job["folder"]) / "answer.json").write_text(answer)
        return
    import flyweight.search  # noqa: F401 (Ray's switches in the environment)

    bad = False
    for name in options.faults or FAULTS:
        if reason := lacking(name):
            print(f"{name}: left out, {reason}")
            continue
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            figures = suffer(name, Path(folder), options.short)
        bad = bad or bool(figures["wrong"])
        print(f"{name}: {'; '.join(figures['wrong']) or 'nothing lost'}", flush=True)
        print(json.dumps(figures, indent=1), flush=True)
        print("Written:", write(f"faults-{name}", figures), flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    main()
