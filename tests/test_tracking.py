"""The tracker against a real database, a real server, and nothing at all."""

import hashlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flyweight.search.spec import Tracking
from flyweight.search.tracking import (
    MemoryTracker,
    MlflowTracker,
    Tracker,
    Undelivered,
    redact,
    tracked_at,
)
from flyweight.search.tracking_process import TrackerProcess
from flyweight.spaces import BadInput, Policy, Prune

LONG_S = 120.0  # a bound that a slow machine keeps too; nothing waits for it when all is well
ALL = Undelivered(0, None)
MakeMlflow = Callable[..., MlflowTracker]


def policy(trial: int) -> Policy:
    return Policy(prune=Prune(width={"stem.0": 8 + trial}))


def search_entry(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "search", "flyweight": "0.1.0", "task": "task.py:Net", "seed": 3, "time": 1000.0,
        "target": {"runtime": "onnxruntime", "threads": 1, "batch_size": 1, "fingerprint": "cpu-f"},
        "teacher": {"metric": 93.0, "metric_test": None, "latency_ms": 2.0, "size_bytes": 100},
        "versions": {"torch": "2.13"}, "data_digest": "d" * 64,
    } | changes  # fmt: skip


def result(trial: int, rung: str = "recalibrate", **changes: Any) -> dict[str, Any]:
    step = ("recalibrate", "short", "full").index(rung)
    return {
        "kind": "result", "trial": trial, "digest": policy(trial).digest,
        "policy": policy(trial).to_dict(), "rung": rung,
        "loss": 0.5 - step / 10, "metric": 90.0 + step,
        "latency_ms": [0.9, 1.0, 1.1], "size_bytes": 50, "seconds": 2.0, "samples": 10,
        "time": 1001.0 + 10 * trial + step, "artifact": None, "constraint": -1.0,
    } | changes  # fmt: skip


def end(trial: int, reason: str = "finished", **changes: Any) -> dict[str, Any]:
    return {
        "kind": "end", "trial": trial, "digest": policy(trial).digest, "reason": reason,
        "error": None, "time": 1005.0 + 10 * trial,
    } | changes  # fmt: skip


def again(trial: int, time: float) -> dict[str, Any]:
    return {"kind": "again", "trial": trial, "digest": policy(trial).digest, "time": time}


def measured(trial: int) -> dict[str, Any]:
    return {
        "kind": "measured", "digest": policy(trial).digest, "latency_ms": 0.8,
        "latency_spread": 0.02, "teacher_latency_ms": 2.0, "time": 2000.0,
    }  # fmt: skip


RECORD = [
    search_entry(),
    *(result(0, rung) for rung in ("recalibrate", "short", "full")),
    end(0),
    result(1),
    end(1, "stopped"),
    result(2),
    end(2, "failed", error="Impossible: no channels left"),
    result(3),
    end(3, "interrupted"),
    measured(0),
]


class TrackerContract:
    """What every tracker keeps."""

    @pytest.fixture
    def tracker(self) -> Tracker:
        raise NotImplementedError

    def test_takes_a_whole_record(self, tracker: Tracker) -> None:
        for entry in RECORD:
            tracker.record(entry)
        assert tracker.finish("FINISHED", timeout_s=LONG_S) == ALL

    def test_takes_no_record_at_all(self, tracker: Tracker) -> None:
        assert tracker.finish("KILLED", timeout_s=LONG_S) == ALL

    def test_counts_what_comes_after_the_end(self, tracker: Tracker) -> None:
        tracker.finish("FINISHED", timeout_s=LONG_S)
        tracker.record(end(0))
        late = tracker.finish("FINISHED", timeout_s=LONG_S)
        assert late.entries == 1
        assert late.reason is not None

    def test_run_id_is_a_name_or_none(self, tracker: Tracker) -> None:
        assert tracker.wait_run_id(LONG_S) == tracker.run_id


class TestMemory(TrackerContract):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return MemoryTracker()

    def test_keeps_everything(self, tmp_path: Path) -> None:
        tracker = MemoryTracker()
        for entry in RECORD:
            tracker.record(entry)
        tracker.finish("KILLED", [tmp_path])
        assert (tracker.entries, tracker.status, tracker.files) == (RECORD, "KILLED", (tmp_path,))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one database: making its tables takes seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def make(store: Path, request: pytest.FixtureRequest) -> MakeMlflow:
    """Makes trackers of one search, in an experiment of the test's own."""

    def make_tracker(search_id: str | None = None, **options: Any) -> MlflowTracker:
        name = f"{request.node.originalname}.{id(request.node)}"
        uri = f"sqlite:///{store}/made/mlflow.db"  # the folder is made
        folder = str(store / "artifacts" / name)
        return MlflowTracker(uri, name, folder, search_id or name, **{"linger_s": 0.05} | options)

    return make_tracker


def runs_of(tracker: MlflowTracker) -> tuple[Any, dict[str, Any]]:
    """The parent run, and the children by the number of their trial; proves them unique."""
    from mlflow import MlflowClient

    client = MlflowClient(tracker._where[0])
    experiment = client.get_experiment_by_name(tracker._where[1])
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_id for run in parents] == [tracker.run_id]
    children = [run for run in runs if run not in parents]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {tracker.run_id}
    by_trial = {run.data.tags["flyweight.trial"].rpartition("/")[2]: run for run in children}
    assert len(by_trial) == len(children)
    return parents[0], by_trial


def metrics_of(tracker: MlflowTracker, run: Any, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    history = MlflowClient(tracker._where[0]).get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def write(tracker: MlflowTracker, entries: list[dict[str, Any]], *files: Path) -> Undelivered:
    for entry in entries:
        tracker.record(entry)
    return tracker.finish("FINISHED", files, timeout_s=LONG_S)


class TestMlflow(TrackerContract):
    @pytest.fixture
    def tracker(self, make: MakeMlflow) -> Tracker:
        return make()

    def test_parent(self, make: MakeMlflow, tmp_path: Path) -> None:
        report = tmp_path / "report.html"
        report.write_text("<p>front")
        tracker = make(search_id="fashion-1")
        assert write(tracker, [search_entry()], report) == ALL
        parent, children = runs_of(tracker)
        assert not children
        assert parent.info.status == "FINISHED"
        assert parent.data.params == {
            "task": "task.py:Net", "seed": "3",
            "target.runtime": "onnxruntime", "target.threads": "1", "target.batch_size": "1",
        }  # fmt: skip
        assert parent.data.metrics == {
            "teacher_metric": 93.0, "teacher_latency_ms": 2.0, "teacher_size_bytes": 100.0
        }  # fmt: skip
        tags = parent.data.tags
        assert tags["flyweight.search"] == tags["mlflow.runName"] == "fashion-1"
        assert tags["flyweight.fingerprint"] == "cpu-f"
        assert tags["flyweight.versions.torch"] == "2.13"
        assert (Path(parent.info.artifact_uri) / "report.html").read_text() == "<p>front"

    def test_child(self, make: MakeMlflow) -> None:
        tracker = make(search_id="s")
        assert write(tracker, RECORD) == ALL
        _, children = runs_of(tracker)
        run = children["0"]
        tags = run.data.tags
        assert tags["flyweight.trial"] == "s/0"
        assert tags["flyweight.digest"] == policy(0).digest
        assert (tags["flyweight.rung"], tags["flyweight.reason"]) == ("full", "finished")
        assert metrics_of(tracker, run, "metric") == [(0, 90.0), (1, 91.0), (2, 92.0)]
        assert run.data.metrics["latency_low_ms"] == 0.9
        assert run.data.metrics["latency_high_ms"] == 1.1
        assert metrics_of(tracker, run, "speedup") == [(2, 2.5)]
        assert (run.info.start_time, run.info.end_time) == (999_000, 1_005_000)
        # The policy in a few words, to group by; the whole of it is a file.
        assert run.data.params == {
            "student": "pruned", "pruned_groups": "1", "dropped_blocks": "0", "criterion": "l1",
            "int8_layers": "0", "calibration": "none", "qat": "false",
        }  # fmt: skip
        content = (Path(run.info.artifact_uri) / "policy.json").read_bytes()
        assert hashlib.sha256(content).hexdigest() == policy(0).digest

    def test_ends(self, make: MakeMlflow) -> None:
        tracker = make()
        never_ended = result(4)
        assert write(tracker, [*RECORD, never_ended]) == ALL
        _, children = runs_of(tracker)
        assert {trial: run.info.status for trial, run in children.items()} == {
            "0": "FINISHED", "1": "FINISHED", "2": "FAILED", "3": "KILLED", "4": "KILLED"
        }  # fmt: skip
        assert children["2"].data.tags["flyweight.error"] == "Impossible: no channels left"

    def test_long_error_is_cut(self, make: MakeMlflow) -> None:
        tracker = make()
        assert write(tracker, [result(0), end(0, "failed", error="x" * 100_000)]) == ALL
        assert len(runs_of(tracker)[1]["0"].data.tags["flyweight.error"]) == 1000

    def test_replay_makes_no_duplicates(self, make: MakeMlflow) -> None:
        assert write(make(), RECORD[:7]) == ALL
        tracker = make(linger_s=LONG_S)  # sent when it is finished
        assert tracker.wait_run_id(LONG_S) is not None
        before = tracker.requests
        assert write(tracker, RECORD) == ALL
        _, children = runs_of(tracker)
        assert sorted(children) == ["0", "1", "2", "3"]
        assert metrics_of(tracker, children["0"], "loss") == [(0, 0.5), (1, 0.4), (2, 0.3)]
        # Trials 2 and 3 (4 each), what was measured of trial 0, the end: nothing for the rest.
        assert tracker.requests - before <= 10

    def test_replay_completes_what_was_left_out(self, make: MakeMlflow) -> None:
        assert write(make(linger_s=LONG_S, capacity=4), RECORD).entries == len(RECORD) - 4
        tracker = make()
        assert write(tracker, RECORD) == ALL
        _, children = runs_of(tracker)
        assert children["0"].data.tags["flyweight.reason"] == "finished"
        assert children["0"].data.metrics["speedup"] == 2.5
        assert {t: r.info.status for t, r in children.items()} == {
            "0": "FINISHED", "1": "FINISHED", "2": "FAILED", "3": "KILLED"
        }  # fmt: skip

    def test_a_resumed_trial_ends_as_its_last_end_says(self, make: MakeMlflow) -> None:
        first = [result(0), end(0, "interrupted", time=1001.5)]
        then = [result(0, "short"), end(0)]
        for entries in (first, first + then, first + then):
            tracker = make()
            assert write(tracker, entries) == ALL
        run = runs_of(tracker)[1]["0"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["flyweight.reason"] == "finished"
        assert run.data.tags["flyweight.rung"] == "short"

    def test_a_trial_that_goes_on_runs_until_it_ends_anew(self, make: MakeMlflow) -> None:
        """As often as it does, in one session or several; each time as its last end says."""
        record = [
            result(0),
            end(0, "stopped", time=1001.5),
            again(0, 1001.6),
            again(0, 1001.7),  # its worker died
            end(0, "interrupted", time=1001.8, error="no such file"),
            again(0, 1001.9),
            result(0, "short"),
            end(0, "failed", time=1002.1, error="Impossible"),
            again(0, 1002.2),
            end(0),
        ]
        statuses = {
            "stopped": "FINISHED", "interrupted": "KILLED", "failed": "FAILED", "": "RUNNING",
            "finished": "FINISHED",
        }  # fmt: skip
        tracker = make()
        for n, entry in enumerate(record):
            if n == 6:
                tracker = make()  # the first was killed
                for earlier in record[:n]:
                    tracker.record(earlier)
                    assert tracker.wait_delivered(LONG_S)
                assert runs_of(tracker)[1]["0"].info.status == "RUNNING"
            tracker.record(entry)
            assert tracker.wait_delivered(LONG_S)
            run = runs_of(tracker)[1]["0"]
            last = record[n] if n and record[n]["kind"] != "result" else {}
            assert run.info.status == statuses[last.get("reason", "")]
            assert run.data.tags.get("flyweight.reason", "") == last.get("reason", "")
            assert run.data.tags.get("flyweight.error", "") == (last.get("error") or "")
        assert run.info.end_time == 1_005_000
        assert tracker.finish("FINISHED", timeout_s=LONG_S) == ALL
        for entries in (record, record[:-1]):  # told once more, at once
            tracker = make()
            assert tracker.wait_run_id(LONG_S)
            before = tracker.requests
            assert write(tracker, entries) == ALL
            assert tracker.requests - before == 1  # the search's end
            assert runs_of(tracker)[1]["0"].info.status == "FINISHED"

    def test_a_whole_record_with_trials_that_went_on(self, make: MakeMlflow) -> None:
        record = [
            result(0), end(0, "interrupted", time=1001.5, error="no such file"), again(0, 1001.6),
            end(0), result(1), end(1, "stopped", time=1012.0), again(1, 1013.0),
        ]  # fmt: skip
        tracker = make(linger_s=LONG_S)
        assert write(tracker, record) == ALL
        _, children = runs_of(tracker)
        assert {t: r.info.status for t, r in children.items()} == {"0": "FINISHED", "1": "KILLED"}
        assert children["0"].data.tags["flyweight.reason"] == "finished"
        assert "flyweight.error" not in children["0"].data.tags

    def test_a_parent_that_is_resumed_runs_again(self, make: MakeMlflow) -> None:
        assert write(make(), RECORD) == ALL
        tracker = make()
        assert tracker.wait_run_id(LONG_S)
        assert runs_of(tracker)[0].info.status == "RUNNING"
        assert write(tracker, []) == ALL
        assert runs_of(tracker)[0].info.status == "FINISHED"

    def test_two_searches_in_one_experiment_do_not_mix(self, make: MakeMlflow) -> None:
        one, two = make(search_id="one"), make(search_id="two")
        assert write(one, RECORD) == write(two, RECORD) == ALL
        assert one.run_id != two.run_id
        from mlflow import MlflowClient

        client = MlflowClient(one._where[0])
        for tracker in (one, two):
            run = client.get_run(str(tracker.run_id))
            condition = f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
            found = client.search_runs([run.info.experiment_id], condition)
            assert len(found) == 4

    def test_a_database_is_made_before_anybody_may_leave(self, tmp_path: Path) -> None:
        tracker = MlflowTracker(f"sqlite:///{tmp_path}/new.db", "e", str(tmp_path), "s")
        tracker.wait_opened(LONG_S)
        assert tracker.run_id
        assert tracker.finish("FINISHED", timeout_s=LONG_S) == ALL

    def test_requests_a_trial(self, make: MakeMlflow) -> None:
        tracker = make(linger_s=0.2)
        assert tracker.wait_run_id(LONG_S)
        before = tracker.requests
        rungs = [[result(0)], [result(0, "short")], [result(0, "full"), end(0)]]
        for entries in rungs:  # each arrives before the next, as in a slow trial
            for entry in entries:
                tracker.record(entry)
            assert tracker.wait_delivered(LONG_S)
        assert tracker.requests - before <= 6
        tracker.finish("FINISHED", timeout_s=LONG_S)

    def test_requests_of_many_trials(self, make: MakeMlflow) -> None:
        tracker = make(linger_s=LONG_S)
        assert tracker.wait_run_id(LONG_S)
        before = tracker.requests
        entries = [e for trial in range(30) for e in (result(trial), end(trial, "stopped"))]
        assert write(tracker, entries) == ALL
        assert tracker.requests - before <= 30 * 4 + 1

    def test_a_full_queue_does_not_block(self, make: MakeMlflow) -> None:
        tracker = make(capacity=10, linger_s=LONG_S)
        for trial in range(50):
            tracker.record(result(trial))
        left = tracker.finish("FINISHED", timeout_s=LONG_S)
        assert left.entries == 40
        assert left.reason is not None
        assert "more than 10 entries" in left.reason
        assert len(runs_of(tracker)[1]) == 10

    def test_a_refused_value_is_dropped_and_counted(self, make: MakeMlflow) -> None:
        assert write(make(), [search_entry()]) == ALL
        tracker = make()
        odd = {"no name: |": 1, "fingerprint": "cpu-f"}
        left = write(tracker, [search_entry(target=odd, time=1002.0), result(0), end(0)])
        assert left.entries == 1
        assert left.reason is not None
        assert "refused" in left.reason
        parent, children = runs_of(tracker)
        assert parent.data.params["seed"] == "3"
        assert children["0"].info.status == "FINISHED"

    @pytest.mark.parametrize("at_once", [True, False])
    def test_a_search_that_goes_on_for_another_target(
        self, make: MakeMlflow, at_once: bool
    ) -> None:
        """Parameters stay what they were first, tags say what is now."""
        head = search_entry()
        other = search_entry(target=head["target"] | {"threads": 2}, time=1002.0)
        sessions = [[head, other]] if at_once else [[head], [head, other]]
        for entries in sessions:
            tracker = make()
            assert write(tracker, entries) == ALL
        parent, _ = runs_of(tracker)
        assert parent.data.params["target.threads"] == "1"
        assert parent.data.tags["flyweight.target.threads"] == "2"
        assert float(parent.data.tags["flyweight.up_to"]) == 1002.0  # nothing is left to be sent

    @pytest.mark.parametrize(
        "entry",
        [{}, {"kind": "news"}, {"kind": "end"}, result(0, loss="low"), measured(7)],
        ids=["empty", "kind", "keys", "value", "digest"],
    )
    def test_what_is_no_entry_is_counted(self, make: MakeMlflow, entry: dict[str, Any]) -> None:
        tracker = make()
        left = write(tracker, [entry, result(1)])
        assert left.entries == 1
        assert left.reason is not None
        assert list(runs_of(tracker)[1]) == ["1"]

    def test_not_finite_is_skipped_and_named(self, make: MakeMlflow) -> None:
        tracker = make()
        entries = [
            result(0, loss=float("nan")),
            result(0, "short", metric=float("inf"), latency_ms=None),
        ]
        assert write(tracker, entries) == ALL
        run = runs_of(tracker)[1]["0"]
        assert run.data.tags["flyweight.not_finite"] == "loss@recalibrate metric@short"
        assert metrics_of(tracker, run, "loss") == [(1, 0.4)]
        assert metrics_of(tracker, run, "metric") == [(0, 90.0)]

    def test_a_file_that_is_missing_is_told(self, make: MakeMlflow, tmp_path: Path) -> None:
        tracker = make()
        left = write(tracker, [search_entry()], tmp_path / "result.json")
        assert left.entries == 0
        assert left.reason is not None
        assert "result.json" in left.reason
        assert runs_of(tracker)[0].info.status == "FINISHED"

    def test_secrets_stay_here(self, make: MakeMlflow) -> None:
        tracker = make()
        text = "cannot reach postgresql://ann:hunter2@db/x?sslpassword=hunter2"
        assert write(tracker, [search_entry(task=text), end(0, "failed", error=text)]) == ALL
        parent, children = runs_of(tracker)
        everything = [*parent.data.params.values(), *children["0"].data.tags.values()]
        assert "hunter2" not in " ".join(everything)

    def test_a_creation_whose_answer_was_lost_is_found(self, make: MakeMlflow) -> None:
        tracker = make(search_id="s")
        run_id = tracker.wait_run_id(LONG_S)
        runs = tracker._runs
        assert runs is not None
        tags = {"mlflow.parentRunId": run_id, "flyweight.trial": "s/0"}
        runs._client.create_run(runs._experiment_id, tags=tags)
        runs._unsure.add(0)
        assert write(tracker, [result(0), end(0)]) == ALL
        assert runs_of(tracker)[1]["0"].data.tags["flyweight.rung"] == "recalibrate"

    def test_search_id_is_checked(self, make: MakeMlflow) -> None:
        with pytest.raises(BadInput, match="search_id"):
            make(search_id="it's")


def runs_in_process(pid: int) -> bool:
    """Whether ``pid`` lives; one that nobody has waited for yet is dead all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestProcess(TrackerContract):
    """MLflow in a process of its own."""

    @pytest.fixture
    def tracker(self, store: Path, request: pytest.FixtureRequest) -> Tracker:
        name = f"process.{id(request.node)}"
        uri = f"sqlite:///{store}/made/mlflow.db"
        return TrackerProcess(uri, name, str(store / "artifacts" / name), name)

    def test_runs_are_as_a_thread_makes_them(self, tracker: TrackerProcess, tmp_path: Path) -> None:
        file = tmp_path / "report.html"
        file.write_text("<p>")
        for entry in RECORD:
            tracker.record(entry)
        assert tracker.finish("FINISHED", [file], timeout_s=LONG_S) == ALL
        from mlflow import MlflowClient

        client = MlflowClient(tracker._uri)
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert [f.path for f in client.list_artifacts(tracker.run_id)] == ["report.html"]
        children = client.search_runs(
            [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
        )
        assert {c.info.status for c in children} == {"FINISHED", "FAILED", "KILLED"}
        assert len(children) == 4

    def test_a_process_that_dies_fails_nothing(
        self, tracker: TrackerProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert tracker.wait_run_id(LONG_S)
        tracker._process.kill()
        for entry in RECORD:
            tracker.record(entry)
        left = tracker.finish("FINISHED", timeout_s=LONG_S)
        assert left == Undelivered(len(RECORD), "the process that writes to MLflow died")
        assert "goes on without it" in caplog.text

    def test_what_arrived_before_the_process_died_is_not_lacking(
        self, tracker: TrackerProcess
    ) -> None:
        for entry in RECORD:
            tracker.record(entry)
        with tracker._changed:
            assert tracker._changed.wait_for(lambda: tracker._under_way == 0, LONG_S)
        tracker._process.kill()
        tracker.record(result(0, time=2000.0))
        assert tracker.finish("FINISHED", timeout_s=LONG_S).entries == 1

    def test_a_process_that_hangs_is_given_up(self, tracker: TrackerProcess) -> None:
        tracker._process.send_signal(signal.SIGSTOP)
        for _ in range(1_000):  # more than a pipe holds
            for entry in RECORD:
                tracker.record(entry)
        left = tracker.finish("FINISHED", timeout_s=0.1)
        assert left.entries == 1_000 * len(RECORD)
        assert left.reason is not None
        assert runs_in_process(tracker._process.pid)  # it may have been making a database
        tracker._process.kill()

    def test_what_was_given_arrives_when_the_driver_is_killed(self, store: Path) -> None:
        code = f"""
import os, sys
from flyweight.search.tracking_process import TrackerProcess
tracker = TrackerProcess("sqlite:///{store}/made/mlflow.db", "orphan", None, "orphan")
for entry in {RECORD!r}:
    tracker.record(entry)
while not tracker._outbox.empty():
    pass
print(tracker._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
        killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
        end_of_wait = time.monotonic() + LONG_S
        while runs_in_process(int(killed.stdout)) and time.monotonic() < end_of_wait:
            time.sleep(0.05)
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{store}/made/mlflow.db")
        experiment = client.get_experiment_by_name("orphan")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert len(runs) == 5
        parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
        assert parent.info.status == "RUNNING"  # to be resumed

    @pytest.mark.slow
    def test_what_a_killed_driver_left_under_way_comes_first(self, store: Path) -> None:
        """Two processes at once would each create runs that the other does not know."""
        uri, many = f"sqlite:///{store}/made/mlflow.db", 40
        record = [search_entry(), *(result(n) for n in range(many)), *(end(n) for n in range(many))]
        code = f"""
import os
from pathlib import Path
from flyweight.search.tracking_process import TrackerProcess
tracker = TrackerProcess({uri!r}, "left", None, "left", Path({str(store)!r}))
assert tracker.wait_run_id({LONG_S})
for entry in {record!r}:
    tracker.record(entry)
while not tracker._outbox.empty():
    pass
os.kill(os.getpid(), 9)
"""
        subprocess.run([sys.executable, "-c", code], check=False)
        again = TrackerProcess(uri, "left", None, "left", store)
        for entry in record:
            again.record(entry)
        assert again.finish("FINISHED", timeout_s=LONG_S) == ALL
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("left")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert len(runs) == 1 + many
        assert {run.info.status for run in runs} == {"FINISHED"}


class TestNoServer:
    """A search that has no server loses nothing but what MLflow would have shown."""

    @pytest.fixture(autouse=True)
    def mlflow(self) -> None:
        """Imported before the time of an end begins, which that would take up."""
        importlib.import_module("mlflow")

    @staticmethod
    def finish(uri: str, timeout_s: float) -> Undelivered:
        tracker = MlflowTracker(uri, "e", None, "s", capacity=5, linger_s=0.05)
        for entry in RECORD:
            tracker.record(entry)
        assert tracker.wait_run_id(0.1) is None
        left = tracker.finish("FINISHED", timeout_s=timeout_s)
        assert left.entries == len(RECORD)
        assert left.reason is not None
        return left

    def test_a_closed_port(self) -> None:
        self.finish(f"http://127.0.0.1:{free_port()}", 1.0)

    def test_a_server_that_says_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            self.finish(f"http://127.0.0.1:{silent.getsockname()[1]}", 1.0)

    @pytest.mark.parametrize(
        "uri",
        ["nonsense://ann:hunter2@x", "http://ann:hunt/er2@x", "/a/folder", "sqlite:////proc/a/b"],
    )
    def test_an_impossible_address_is_given_up(self, uri: str) -> None:
        assert "cannot be used" in str(self.finish(uri, LONG_S).reason)

    @pytest.mark.parametrize("password", ["hunter2", "hunt/er2", "hunt@er2"])
    def test_secrets(
        self,
        password: str,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        left = self.finish(f"http://ann:{password}@127.0.0.1:{free_port()}", 1.0)
        assert "er2" not in str(left.reason) + caplog.text + "".join(capfd.readouterr())

    def test_nobody_waits_for_one_that_was_seen_to_be_away(self) -> None:
        tracker = TrackerProcess(f"http://127.0.0.1:{free_port()}", "e", None, "s")
        assert tracker.wait_run_id(threading.TIMEOUT_MAX) is None
        assert tracker.finish("FINISHED", timeout_s=0.1).reason is not None

    def test_the_import_of_the_tracker_is_light(self) -> None:
        code = "import sys, flyweight.search.tracking; sys.exit('mlflow' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("see http://a:b@h/x and more", "see http://***@h/x and more"),
        ("http://a:b@c@h", "http://***@h"),
        ("sqlite:////home/a@b/x.db", "sqlite:////home/a@b/x.db"),
        ("postgresql://h/x?password=b&y=1", "postgresql://h/x?password=***&y=1"),
        ("abfs://c/x?client_id=a&client_secret=b", "abfs://c/x?client_id=a&client_secret=***"),
        ("abfs://c/x?sv=1&sig=b%2F&se=2", "abfs://c/x?sv=1&sig=***&se=2"),
        ("s3://b?access_key=a&secret_key=c", "s3://b?access_key=***&secret_key=***"),
        ("nothing here", "nothing here"),
    ],
)
def test_redact(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_redact_a_known_password_anywhere() -> None:
    assert redact("wrong password hunter2 for ann", "http://ann:hunter2@h") == (
        "wrong password *** for ann"
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A real MLflow server on loopback that can die and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1",
            "--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group: the workers too
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_everything(server: Server) -> None:
    trials = 60
    tracker = MlflowTracker(f"http://127.0.0.1:{server.port}", "e", None, "s", linger_s=0.05)
    tracker.record(search_entry())  # before there is a server
    server.start()
    assert tracker.wait_run_id(LONG_S)
    for trial in range(trials):
        if trial == trials // 2:
            assert server.process is not None
            server.kill()  # with requests under way
        for entry in (result(trial), result(trial, "short"), end(trial, "stopped")):
            tracker.record(entry)
        time.sleep(0.05)
    server.start()
    file = server.folder / "result.json"
    file.write_text("{}")
    assert tracker.finish("FINISHED", [file], timeout_s=LONG_S) == ALL
    parent, children = runs_of(tracker)
    assert sorted(children, key=int) == [str(trial) for trial in range(trials)]
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert {run.data.tags["flyweight.rung"] for run in children.values()} == {"short"}
    stored = {file.name: file for file in (server.folder / "artifacts").rglob("*.json")}
    assert len(list((server.folder / "artifacts").rglob("policy.json"))) == trials
    assert "result.json" in stored
    assert parent.info.status == "FINISHED"


@pytest.mark.slow
def test_requests_that_the_server_counts(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.start()
    tracker = MlflowTracker(f"http://127.0.0.1:{server.port}", "e", None, "s", linger_s=0.05)
    assert tracker.wait_run_id(LONG_S)
    ours, before = tracker.requests, _answered(server)
    for trial in range(5):
        for entries in ([result(trial)], [result(trial, "full"), end(trial)]):
            for entry in entries:
                tracker.record(entry)
            assert tracker.wait_delivered(LONG_S)
    time.sleep(1.0)  # the server's log may lag
    assert _answered(server) - before == tracker.requests - ours == 5 * 5
    assert tracker.finish("FINISHED", timeout_s=LONG_S) == ALL
    assert capfd.readouterr().out == ""


def _answered(server: Server) -> int:
    return server.log.read_text().count(' HTTP/1.1" ')


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("sqlite:////data/mlflow.db", "/data/mlartifacts"),
        ("sqlite+pysqlite:////data/mlflow.db?timeout=9", "/data/mlartifacts"),
        ("sqlite:///:memory:", None),
        ("http://host:5000", None),
    ],
)
def test_files_lie_beside_the_database_that_knows_of_them(uri: str, place: str | None) -> None:
    """A task's folder may be one that nobody can write to."""
    header = {"search_id": "s"}
    found = tracked_at(Tracking(uri=uri, experiment="e"), header)
    assert found == (uri, "e", place and f"file://{place}", "s")
