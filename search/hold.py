"""Who holds a run: one process at a time, on whatever machine.

On one machine the system's file lock says it, and goes with its process (``record.py``). Beyond it
a file in the run directory, and one in the storage, says who holds the run, and is written again
and again as a sign of life. One that was not for long is of a process that is gone.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from ..spaces import BadInput
from .storage import Storage

FOLDER = "held"
NAME = f"{FOLDER}/by.json"
SIGN_S = 20.0  # between two signs of life
STALE_S = 120.0  # the clocks of machines differ
_TOKEN = secrets.token_hex(8)  # of this process: host and pid may be another container's too


class Hold:
    """Held from now on until ``close``. Raises BadInput if another process holds it, OSError if the
    storage is away. locked: no other process of this machine can hold it.

    A process that gave no sign for long, its machine being suspended say, loses it to the next who
    asks: ``check`` and ``look`` tell it so before it does harm.
    """

    def __init__(self, storage: Storage, name: str, *, locked: bool = False) -> None:
        self._storage, self._name = storage, name
        self._lost = ""
        holder = read(storage)
        if holder and not (locked and holder["host"] == socket.gethostname()) and _lives(holder):
            age = time.time() - holder["time"]
            raise BadInput(
                f"{name} is held by {told(holder)}, which gave a sign of life {age:.0f} s ago; "
                "wait for it or use another --out; if it is gone, try again "
                f"{STALE_S:.0f} s after its last"
            )
        self._sign()
        self._looked = time.time()
        self._ends, self._wake = False, threading.Event()
        self._thread = threading.Thread(target=self._live, name="flyweight-hold", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises OSError if another process is known to have taken it. Never waits for the storage:
        after a sleep the thread is woken to look, unless it has tried since."""
        if time.time() - self._looked > STALE_S - SIGN_S:
            self._wake.set()
        if self._lost:
            raise OSError(f"{self._name} was taken over by {self._lost} while this one slept")

    def look(self) -> None:
        """The same, after a look at the storage where others may take this process for gone: for
        who is about to write there and may wait."""
        if not self._lost and self._slept():
            with contextlib.suppress(OSError):  # away: nobody else comes to it either
                self._look()
        self.check()

    def close(self) -> None:
        """Gives it back."""
        self._ends = True
        self._wake.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._look()
        if not self._lost:
            self._storage.remove(FOLDER)  # where it cannot be removed it grows stale

    def _live(self) -> None:
        while not self._lost:
            self._wake.wait(SIGN_S)
            if self._ends:
                return
            self._looked = time.time()
            self._wake.clear()
            with contextlib.suppress(OSError):  # away for a while
                self._look()
                if not self._lost:
                    self._sign()

    def _slept(self) -> bool:
        """Whether others may take this process for gone. By the time of day: the system's own
        clock stands still while a machine is suspended."""
        return time.time() - self._signed > STALE_S - SIGN_S

    def _look(self) -> None:
        holder = read(self._storage)
        if holder and _who() != {name: holder[name] for name in _who()}:
            self._lost = told(holder)
        elif holder is None and self._slept():
            self._lost = f"{told(None)}, which has ended"

    def _sign(self) -> None:
        now = time.time()
        self._storage.write(NAME, json.dumps(_who() | {"time": now}).encode())
        self._signed = now


def _who() -> dict[str, Any]:
    """This process, as it is known to others."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "token": _TOKEN}


def read(storage: Storage) -> dict[str, Any] | None:
    """Who says that they hold the run: host, pid, token and the time of their last sign; None if
    nobody does. Raises OSError if the storage is away."""
    try:
        found = json.loads(storage.read(NAME))
        return {
            "host": str(found["host"]), "pid": int(found["pid"]),
            "token": str(found.get("token", "")), "time": float(found["time"]),
        }  # fmt: skip
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def told(holder: dict[str, Any] | None) -> str:
    """``holder`` in words."""
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _lives(holder: dict[str, Any]) -> bool:
    if time.time() - holder["time"] > STALE_S:
        return False
    if holder["host"] != socket.gethostname():
        return True
    # This process, whose run directory may lie in the storage; or one in its place before, as in a
    # container that was begun anew. One in another container that lives is told by the token.
    if holder["pid"] == os.getpid():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
