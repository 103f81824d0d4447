"""The record: the append-only log of a search, from which everything else is rebuilt."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from ..spaces import BadInput
from .hold import Hold, told
from .hold import read as held_by
from .storage import Storage, whole_lines

Entry = dict[str, Any]
# What is synced. The rest can be had again: a trial that began, a rejection; where its end is lost
# a trial climbs once more.
SYNCED = ("search", "result", "measured")


# Why a trial ended that a later session goes on with, if there is time then.
NOT_FOR_GOOD = ("interrupted", "deadline")


class Record(Protocol):
    """Where results are appended as they come. Entries are JSON objects with a ``kind``:
    search, begin, again, result, died, end, rejected, priced, measured, done. again: a trial goes
    on that its worker's death, its rank or the end of a session had stopped. priced: what an
    artifact of an earlier session is predicted to take on this one's target; null where that cannot
    run it. done: result.json is that of the session."""

    def append(self, entry: Entry) -> None:
        """Adds one entry; a process that dies after this has lost nothing. Raises OSError, also
        when an entry before this one could not be brought to the disk."""

    def entries(self) -> list[Entry]:
        """All entries so far, oldest first."""


class MemoryRecord:
    """The in-memory twin."""

    def __init__(self, entries: list[Entry] | None = None) -> None:
        self._entries = list(entries or [])

    def append(self, entry: Entry) -> None:
        self._entries.append(json.loads(json.dumps(entry, allow_nan=False)))

    def entries(self) -> list[Entry]:
        return list(self._entries)


class FileRecord:
    """``record.jsonl`` in a run directory, held by one process at a time.

    Each entry is written whole before ``append`` returns: a process that dies loses nothing. A
    thread syncs results with all that came before them, one sync for as many as came during the
    last: a machine that dies loses some milliseconds, and no trial waits for the disk. A last
    line that a crash cut off is removed on opening; damage anywhere else is an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (held for the search's life)
        locked = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            who = told(held_by(Storage(path.parent)))
            raise BadInput(
                f"{path} is being written by {who}; wait for it, or use --out"
            ) from error
        except OSError:  # a network drive without locks: who holds it is known by signs of life
            locked = False
        try:
            self._holds = [Hold(Storage(path.parent), str(path.parent), locked=locked)]
        except (BadInput, OSError):
            self._file.close()
            raise
        try:
            self._entries = list(read(path))
        except BadInput:
            self._holds[0].close()
            self._file.close()
            raise
        self._size = len(whole_lines(path.read_bytes()))  # of what is whole, in bytes
        os.truncate(self._file.fileno(), self._size)
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="flyweight-record")
        self._next_sync: Future[None] = Future()
        self._failed: OSError | None = None  # kept: the system tells of a failed sync only once

    def holds(self, hold: Hold) -> None:
        """Nothing is appended any more once ``hold`` is lost, either; it is closed with this."""
        self._holds.append(hold)

    def append(self, entry: Entry) -> None:
        for hold in self._holds:
            hold.check()
        line = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(
                    f"only {written} of {len(line)} bytes could be written to {self.path}"
                )
            if entry.get("kind") in SYNCED:
                self._sync()
        except OSError as error:
            os.truncate(self._file.fileno(), self._size)  # a full disk leaves no half line behind
            if error.errno and not error.filename:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        self._size += len(line)
        self._entries.append(json.loads(line))

    def entries(self) -> list[Entry]:
        return list(self._entries)

    def close(self) -> None:
        """Waits until everything is on the disk. Raises OSError if it does not get there."""
        self._syncer.shutdown()
        self._bring_to_disk()
        for hold in self._holds:
            hold.close()
        self._file.close()
        if self._failed:
            raise self._failed

    def _sync(self) -> None:
        if self._failed:
            raise self._failed
        self._next_sync.cancel()  # if it has not begun: the new one takes its entries along
        self._next_sync = self._syncer.submit(self._bring_to_disk)

    def _bring_to_disk(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failed = self._failed or error


def read(path: Path) -> Iterator[Entry]:
    """The entries of a record file, also of one that is still being written."""
    for number, line in enumerate(whole_lines(path.read_bytes()).splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{path}, line {number} is damaged: {error}") from error
        if not isinstance(entry, dict) or "kind" not in entry:
            raise BadInput(f"{path}, line {number} is damaged: it is no entry of a record")
        yield entry


def ends(entries: Iterable[Entry]) -> dict[int, Entry]:
    """By trial the end that counts: one does until its trial goes on."""
    out: dict[int, Entry] = {}
    for entry in entries:
        if entry["kind"] == "end":
            out[entry["trial"]] = entry
        elif entry["kind"] in ("begin", "again", "result"):
            out.pop(entry["trial"], None)
    return out


def at_work(entries: Sequence[Entry]) -> list[float]:
    """For each entry the seconds that the search had worked when it was written. The time between
    its sessions does not count, nor that in which artifacts were measured, perhaps days after."""
    out: list[float] = []
    before = began = latest = 0.0
    for entry in entries:
        measured = entry["kind"] == "measured"
        at = latest if measured else float(entry.get("time") or latest)
        if entry["kind"] == "search":
            before += latest - began
            began = latest = at
        latest = max(latest, at)
        out.append(before + max(0.0, at - began))
    return out
