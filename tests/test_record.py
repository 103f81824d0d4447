"""The record: what is appended stays, whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flyweight.search.record import FileRecord, MemoryRecord, ends, read
from flyweight.spaces import BadInput


def entry(number: int) -> dict[str, object]:
    return {"kind": "end", "trial": number, "error": "line\u2028one\r\ntwo"}


def test_entries_are_read_back_as_they_were_appended(tmp_path: Path) -> None:
    file, memory = FileRecord(tmp_path / "r"), MemoryRecord()
    for number in range(3):
        file.append(entry(number))
        memory.append(entry(number))
        assert len(list(read(tmp_path / "r"))) == number + 1  # on the disk at once
    file.close()
    again = FileRecord(tmp_path / "r")
    assert again.entries() == memory.entries() == [entry(n) for n in range(3)]
    again.close()


def test_what_the_disk_refuses_is_told_at_the_next_result_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = FileRecord(tmp_path / "r")
    sync, calls = os.fsync, []

    def fail_once(descriptor: int) -> None:  # as Linux does: the next sync succeeds
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError("input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    record.append({"kind": "result", "trial": 0})
    record._next_sync.result()
    with pytest.raises(OSError, match="input/output"):
        record.append({"kind": "result", "trial": 1})
    assert [e["trial"] for e in read(tmp_path / "r")] == [0]
    with pytest.raises(OSError, match="input/output"):
        record.close()


def test_the_last_result_is_synced_after_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = FileRecord(tmp_path / "r")
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda d: sizes.append(os.fstat(d).st_size))
    for number in range(50):
        record.append({"kind": "result", "trial": number})
    record._next_sync.result()
    assert sizes[-1] == (tmp_path / "r").stat().st_size
    record.close()


def test_a_last_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r"
    whole = json.dumps(entry(0)).encode() + b"\n"
    line = json.dumps(entry(1)).encode() + b"\n"
    for cut in range(len(line)):
        path.write_bytes(whole + line[:cut])
        assert list(read(path)) == [entry(0)]
        record = FileRecord(path)
        record.append(entry(2))
        record.close()
        assert list(read(path)) == [entry(0), entry(2)]


@pytest.mark.parametrize("damage", [b'{"kind":', b"\xff\xfe", b"3", b"[]", b"{}", b""])
def test_damage_anywhere_else_is_an_error_that_names_the_line(
    tmp_path: Path, damage: bytes
) -> None:
    path = tmp_path / "r"
    path.write_bytes(b'{"kind":"end"}\n' + damage + b'\n{"kind":"end"}\n')
    before = path.read_bytes()
    for _ in range(2):  # the lock is given back
        with pytest.raises(BadInput, match="line 2 is damaged"):
            FileRecord(path)
    assert path.read_bytes() == before


def test_a_second_writer_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    record = FileRecord(tmp_path / "r")
    record.append(entry(0))
    with pytest.raises(BadInput, match=f"process {os.getpid()} on "):
        FileRecord(tmp_path / "r")
    record.append(entry(1))
    record.close()
    assert len(list(read(tmp_path / "r"))) == 2


def test_what_is_no_json_number_is_refused_whole(tmp_path: Path) -> None:
    record = FileRecord(tmp_path / "r")
    for twin in (record, MemoryRecord()):
        with pytest.raises(ValueError, match="JSON"):
            twin.append({"kind": "result", "loss": float("nan")})
        assert twin.entries() == []
    record.close()
    assert (tmp_path / "r").read_bytes() == b""


FULL = """
import resource, sys
from pathlib import Path
from flyweight.search.record import FileRecord
record = FileRecord(Path(sys.argv[1]))
record.append({"kind": "end", "n": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
try:
    record.append({"kind": "end", "text": "x" * 200})
except OSError:
    print(len(record.entries()))
"""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "r")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.strip() == "1"
    assert (tmp_path / "r").read_bytes() == b'{"kind":"end","n":0}\n'


def test_an_end_counts_until_its_trial_goes_on() -> None:
    def of(kind: str, trial: int) -> dict[str, object]:
        return {"kind": kind, "trial": trial, "reason": f"{kind} {trial}"}

    first, second = of("end", 1), of("end", 2)
    entries = [{"kind": "search"}, of("begin", 1), of("begin", 2), first, second]
    assert ends(entries) == {1: first, 2: second}
    entries += [of("priced", 1), of("died", 2), {"kind": "measured"}]
    assert ends(entries) == {1: first, 2: second}
    for kind in ("again", "result"):
        assert ends([*entries, of(kind, 2)]) == {1: first}
    assert ends([*entries, of("again", 2), first | {"trial": 2}]) == {
        1: first,
        2: {**first, "trial": 2},
    }
