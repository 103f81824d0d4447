"""A run directory is held by one process, on whatever machine; one that died holds nothing."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flyweight.search import hold
from flyweight.search.record import FileRecord
from flyweight.spaces import BadInput


def held_elsewhere(run_dir: Path, seconds_ago: float) -> None:
    place = run_dir / hold.NAME
    place.write_text(json.dumps({"host": "another-machine", "pid": 77}))
    then = time.time() - seconds_ago
    os.utime(place, (then, then))


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
    assert (tmp_path / hold.NAME).exists()
    FileRecord(path).close()
    assert not (tmp_path / hold.NAME).exists()


def test_another_machine_holds_it_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    held_elsewhere(tmp_path, 5)
    with pytest.raises(BadInput, match=r"process 77 on another-machine.* 5 s ago"):
        FileRecord(tmp_path / "record.jsonl")
    assert json.loads((tmp_path / hold.NAME).read_text())["pid"] == 77  # as it was
    held_elsewhere(tmp_path, hold.STALE_S + 1)
    FileRecord(tmp_path / "record.jsonl").close()
    (tmp_path / hold.NAME).write_text("damaged")
    FileRecord(tmp_path / "record.jsonl").close()


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "TOUCH_S", 0.05)
    record = FileRecord(tmp_path / "record.jsonl")
    os.utime(tmp_path / hold.NAME, (0, 0))
    until = time.monotonic() + 30
    while (tmp_path / hold.NAME).stat().st_mtime == 0:
        assert time.monotonic() < until
        time.sleep(0.02)
    record.close()
