"""A run directory is held by one process, on whatever machine; one that died holds nothing."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flyweight.search import hold
from flyweight.search.record import FileRecord
from flyweight.search.storage import Mirror, Storage
from flyweight.spaces import BadInput


def held_by(run_dir: Path, host: str, pid: int, seconds_ago: float) -> None:
    who = {"host": host, "pid": pid, "time": time.time() - seconds_ago}
    Storage(run_dir).write(hold.NAME, json.dumps(who).encode())


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flyweight.search.record import FileRecord\n"
        "record = FileRecord(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "record.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BadInput, match=f"process {process.pid} on {socket.gethostname()}"):
            FileRecord(path)
        process.kill()  # which leaves its note behind
    assert hold.read(Storage(tmp_path))
    FileRecord(path).close()
    assert not (tmp_path / "held").exists()


def test_another_machine_holds_it_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    held_by(tmp_path, "another-machine", 77, 5)
    with pytest.raises(BadInput, match=r"process 77 on another-machine.* 5 s ago"):
        FileRecord(tmp_path / "record.jsonl")
    assert json.loads((tmp_path / hold.NAME).read_text())["pid"] == 77  # as it was
    held_by(tmp_path, "another-machine", 77, hold.STALE_S + 1)
    FileRecord(tmp_path / "record.jsonl").close()
    Storage(tmp_path).write(hold.NAME, b"damaged")
    FileRecord(tmp_path / "record.jsonl").close()


def test_a_storage_is_held_from_another_directory_too(tmp_path: Path) -> None:
    """Two heads that go on with one search: no file lock is between them."""
    storage, here = Storage(tmp_path), socket.gethostname()
    held_by(tmp_path, here, os.getppid(), 1)
    with pytest.raises(BadInput, match=f"the storage is held by process {os.getppid()} on {here}"):
        hold.Hold(storage, "the storage")
    with subprocess.Popen(["true"]) as gone:
        pass
    held_by(tmp_path, here, gone.pid, 1)  # killed a moment ago
    hold.Hold(storage, "the storage").close()


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "SIGN_S", 0.05)
    record, storage = FileRecord(tmp_path / "record.jsonl"), Storage(tmp_path)
    first, until = hold.read(storage), time.monotonic() + 30
    while (now := hold.read(storage)) == first:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert now
    assert first
    assert now == first | {"time": now["time"]}
    record.close()
    assert hold.read(storage) is None


@pytest.mark.parametrize("ended", [False, True])
def test_who_slept_for_long_and_was_taken_for_gone_writes_nothing_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """A machine that was suspended, and meanwhile another head went on with the search."""
    place = Storage(tmp_path / "storage")
    (tmp_path / "run").mkdir()
    record = FileRecord(tmp_path / "run" / "record.jsonl")
    far = hold.Hold(place, "the storage")
    record.holds(far)
    record.append({"kind": "begin", "trial": 0})  # nobody came
    place.write("record.jsonl", b"of the other\n")
    if ended:
        place.remove(hold.FOLDER)
    else:
        held_by(tmp_path / "storage", "another-machine", 77, 0)
    why = "which has ended" if ended else "process 77 on another-machine"
    monkeypatch.setattr(hold, "STALE_S", 0.0)  # every moment is long
    mirror = Mirror(record.path, place, far.look)
    mirror.close()
    assert "taken over" in str(mirror.failed)
    with pytest.raises(OSError, match=f"the storage was taken over by .*{why}"):
        record.append({"kind": "begin", "trial": 1})
    assert len(record.entries()) == len(record.path.read_text().splitlines()) == 1
    assert place.read("record.jsonl") == b"of the other\n"
    record.close()
    assert (hold.read(place) is None) == ended  # the other's note stays


def test_another_process_of_the_same_host_and_pid_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that share a host's name: in each the search is process 1."""
    place = Storage(tmp_path)
    first = hold.Hold(place, "the storage")
    monkeypatch.setattr(hold, "_TOKEN", "of another container")
    second = hold.Hold(place, "the storage")  # as after a restart: nobody waits for it
    with monkeypatch.context() as patch:
        patch.setattr(hold, "_TOKEN", "of the first")
        patch.setattr(hold, "STALE_S", 0.0)
        with pytest.raises(OSError, match="was taken over by process"):
            first.look()
        first.close()
    assert hold.read(place)  # the second's note stays
    second.check()
    second.close()
    assert hold.read(place) is None


def test_to_check_never_waits_for_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread alone looks; after a sleep ``check`` wakes it."""
    far, readers = hold.Hold(Storage(tmp_path), "the storage"), set[str]()
    looked, goes_on = threading.Event(), threading.Event()

    def away(_: Storage) -> None:
        readers.add(threading.current_thread().name)
        looked.set()
        goes_on.wait(30)
        raise OSError("away")

    monkeypatch.setattr(hold, "read", away)
    monkeypatch.setattr(hold, "STALE_S", 0.0)
    far.check()
    assert looked.wait(10)
    far.check()
    assert readers == {"flyweight-hold"}
    goes_on.set()
    far.close()
