"""MLflow in a process of its own, fed over a pipe.

MLflow takes about as much of a core as everything else that happens between two trials; in the
driver's interpreter Ray Tune and Optuna would wait for it. And should it crash, the search goes on.

What goes in and out are lines of JSON: first how to reach MLflow, then ``{"entry": ...}`` and
``{"finish": ...}``; back come ``{"run_id": ...}`` (null: the server does not answer yet),
``{"delivered": ...}`` (how many entries more), ``{"warning": ...}``, ``{"undelivered": ...}``.
"""

import contextlib
import fcntl
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .tracking import LATE, NOT_IN_TIME, Entry, MlflowTracker, Status, Undelivered, redact

NICENESS = 19  # it follows: trials and the search go first
GRACE_S = 2.0  # beyond the time that the tracker itself has to finish
ORPHAN_S = 30.0  # to deliver what it has when the driver is gone
OPENING_S = 600.0  # to make a database, on a machine however busy
_DIED = "the process that writes to MLflow died"

_log = logging.getLogger(__name__)


class TrackerProcess:
    """A ``Tracker`` that hands everything to a ``MlflowTracker`` elsewhere; same arguments.

    run_dir: of the search. Locked by the process that writes: what one still delivers whose driver
    was killed comes first, for two at a time would each create runs that the other does not know.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_location: str | None,
        search_id: str,
        run_dir: Path | None = None,
    ) -> None:
        self._uri = uri
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards all that follows
        self._run_id: str | None = None
        self._tried = False  # the server has answered, or failed to
        self._under_way = 0  # entries given, and not known to have arrived
        self._late = 0
        self._ending = False
        self._answer: Undelivered | None = None
        self._gone = False
        # A session of its own: Ctrl-C in the terminal ends the search, not what follows it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],  # nothing is imported from the folder here
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        lock = str(run_dir) if run_dir else None
        self._outbox.put({"open": [uri, experiment, artifact_location, search_id], "lock": lock})
        for target in (self._send, self._listen):
            threading.Thread(target=target, name="flyweight-mlflow", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        return self._run_id

    def wait_run_id(self, timeout_s: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._tried or self._over, timeout_s)
        return self._run_id

    def record(self, entry: Entry) -> None:
        with self._changed:
            if self._ending:
                self._late += 1
            else:
                self._under_way += 1
                self._outbox.put({"entry": entry})

    def finish(
        self, status: Status, files: Iterable[Path] = (), timeout_s: float = 30.0
    ) -> Undelivered:
        with self._changed:
            if not self._ending:
                self._ending = True
                self._outbox.put({"finish": [status, [str(f) for f in files], timeout_s]})
                self._outbox.put(None)
            self._changed.wait_for(lambda: self._over, timeout_s + GRACE_S)
            why = _DIED if self._gone else NOT_IN_TIME
            answer = self._answer or Undelivered(self._under_way, why)
            late = self._late
        # One that may be making a database is left to itself: it ends soon.
        if self._run_id is not None or self._over:
            self._process.kill()
            self._process.wait()
        if not late:
            return answer
        reasons = [answer.reason, f"{late} entries: {LATE}"]
        return Undelivered(answer.entries + late, "; ".join(r for r in reasons if r))

    @property
    def _over(self) -> bool:
        return self._answer is not None or self._gone

    def _send(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError), pipe:  # a pipe that breaks: _listen sees the end too
            while (message := self._outbox.get()) is not None:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()

    def _listen(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                self._hear(json.loads(line))
        with self._changed:
            if self._answer is None:
                _log.warning("%s; the search goes on without it", _DIED)
            self._gone = True
            self._changed.notify_all()

    def _hear(self, message: dict[str, Any]) -> None:
        if text := message.get("warning"):
            _log.warning("%s", redact(text, self._uri))
            return
        with self._changed:
            if "run_id" in message:
                self._run_id, self._tried = message["run_id"], True
            self._under_way -= message.get("delivered", 0)
            if "undelivered" in message:
                self._answer = Undelivered(*message["undelivered"])
            self._changed.notify_all()


class _Warnings(logging.Handler):
    """Sends what is logged here to the driver, which has the display."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(warning=record.getMessage())


def _say(**message: Any) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(_OUT, json.dumps(message).encode() + b"\n")


def _main() -> None:
    os.nice(NICENESS)
    logging.getLogger("flyweight").addHandler(_Warnings(logging.WARNING))
    if not (opening := sys.stdin.readline()):
        return  # the driver was killed before it said anything
    begin = json.loads(opening)
    with locked(begin["lock"]):
        _follow(MlflowTracker(*begin["open"], delivered=lambda count: _say(delivered=count)))


def _follow(tracker: MlflowTracker) -> None:
    threading.Thread(target=_tell_run_id, args=(tracker,), daemon=True).start()
    for line in sys.stdin:
        if not line.endswith("\n"):
            break  # the driver was killed while it wrote
        message = json.loads(line)
        if "entry" in message:
            tracker.record(message["entry"])
            continue
        status, files, timeout_s = message["finish"]
        missing = tracker.finish(status, [Path(f) for f in files], timeout_s)
        if missing.reason:  # and no answer until then: nobody shall end this process
            tracker.wait_opened(OPENING_S)
        _say(undelivered=[missing.entries, missing.reason])
        return
    # The driver was killed: its search can be resumed, so the run stays open.
    tracker.wait_delivered(ORPHAN_S)
    tracker.wait_opened(OPENING_S)


@contextlib.contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Waits until no other process has locked ``folder``, where its file system knows locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if folder is not None:
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _tell_run_id(tracker: MlflowTracker) -> None:
    tracker.wait_opened(float(threading.TIMEOUT_MAX))
    _say(run_id=tracker.run_id)
    if tracker.run_id is None and (late := tracker.wait_run_id(float(threading.TIMEOUT_MAX))):
        _say(run_id=late)


if __name__ == "__main__":
    _OUT = os.dup(1)  # whatever a library prints must not be taken for an answer
    os.dup2(2, 1)
    _main()
