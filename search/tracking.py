"""The tracker: what follows a search from outside, and can neither slow, stop nor lose it.

A tracker is given every entry of the record. record.jsonl is the truth: whatever a tracker could
not deliver is counted, and replaying the record into a new tracker of the same search completes it.
"""

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from ..spaces import BadInput

if TYPE_CHECKING:
    from .mlflow_entries import Update
    from .mlflow_runs import Runs
    from .spec import Tracking

Entry = dict[str, Any]
Status = Literal["FINISHED", "KILLED", "FAILED"]
T = TypeVar("T")

# What a user has set stays. MLflow's own retries are off because they last minutes, and because a
# creation that is repeated below us, after an answer that got lost, would make a second run.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Ending a run would print two lines to stdout, at the cost of one more request.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A compression tool has no business telling third parties that it ran.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
TRACKED = ("search", "again", "result", "end", "measured")  # kinds of entries that a tracker shows
_FIRST_DELAY_S, _LAST_DELAY_S = 0.5, 10.0
_REASONS = 5  # kept and told

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Undelivered:
    """How many entries did not arrive, as far as is known, and why (None: everything did, the files
    too). Those of earlier sessions, which are given again, may be there."""

    entries: int = 0
    reason: str | None = None


class Tracker(Protocol):
    """Follows a search. No method raises; only ``finish`` and ``wait_run_id`` wait, and bounded."""

    @property
    def run_id(self) -> str | None:
        """The id of the search's run, None as long as it is unknown."""

    def wait_run_id(self, timeout_s: float) -> str | None:
        """``run_id``, after waiting for it for at most ``timeout_s``; a tracker in a process of its
        own no longer waits for a server that was seen to be away."""

    def record(self, entry: Entry) -> None:
        """Takes one entry of record.jsonl and returns at once. The entry must not change later."""

    def finish(
        self, status: Status, files: Iterable[Path] = (), timeout_s: float = 30.0
    ) -> Undelivered:
        """Ends the search's run and stores ``files`` with it; the tracker takes nothing after."""


class MemoryTracker:
    """Keeps what it is given: for ``tracking: null`` and for tests."""

    run_id: str | None = None

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.status: Status | None = None
        self.files: tuple[Path, ...] = ()
        self._left_out = 0

    def wait_run_id(self, timeout_s: float) -> str | None:  # noqa: ARG002
        return None

    def record(self, entry: Entry) -> None:
        if self.status is None:
            self.entries.append(entry)
        else:
            self._left_out += 1

    def finish(
        self,
        status: Status,
        files: Iterable[Path] = (),
        timeout_s: float = 30.0,  # noqa: ARG002
    ) -> Undelivered:
        if self.status is None:
            self.status, self.files = status, tuple(files)
        return Undelivered(self._left_out, LATE if self._left_out else None)


def tracked_at(tracking: "Tracking", header: Entry) -> tuple[str, str, str | None, str]:
    """Where a search that ``header`` opens is tracked: the first arguments of a tracker."""
    files = files_beside(tracking.uri)
    place = None if files is None else files.as_uri()
    return tracking.uri, tracking.experiment, place, header["search_id"]


def files_beside(uri: str) -> Path | None:
    """Where the files of runs lie that the database file ``uri`` keeps: beside it, for with one
    MLflow would store them wherever a process just stands. None for any other ``uri``."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:)([^?]+)(?:\?.*)?", uri)
    return Path(match[1]).resolve().parent / "mlartifacts" if match else None


LATE = "came after the end"
NOT_IN_TIME = "MLflow did not take everything in the time given"


class MlflowTracker:
    """Writes a search behind its back into MLflow: one parent run, a child run per trial.

    One thread talks to the server. It gathers entries for ``linger_s``, sends them run by run,
    and waits 0.5 s to 10 s, doubling, after an error that may pass. At most ``capacity`` entries
    wait in memory; what comes beyond is left out and counted. A run that exists is found, never
    made twice, so any part of the record may be given again.

    uri: of the server or the database. artifact_location: of an experiment that has to be created
    (None: the server's default). search_id: letters, digits and ``._:-``, unique for the search.
    delivered: is told how many entries more have arrived.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_location: str | None,
        search_id: str,
        *,
        capacity: int = 50_000,
        linger_s: float = 1.0,
        delivered: Callable[[int], None] = lambda _: None,
    ) -> None:
        if not re.fullmatch(r"[\w.:-]+", search_id, re.ASCII):
            raise BadInput(f"search_id is of letters, digits and ._:- but got {search_id!r}")
        self._where = (uri, experiment, artifact_location, search_id)
        self._capacity = capacity
        self._linger_s = linger_s
        self._delivered = delivered
        self._delay_s = _FIRST_DELAY_S
        self._runs: Runs | None = None

        self._changed = threading.Condition()  # guards all that follows
        self._inbox: list[Entry] = []
        self._held = 0  # entries taken and neither delivered nor refused
        self._left_out: dict[str, int] = {}  # entries, by why
        self._outage: str | None = None
        self._ending: tuple[Status, tuple[Path, ...]] | None = None
        self._abandoned = False
        self._done = False
        # A daemon: a server that hangs must not keep the process alive.
        threading.Thread(target=self._run, name="flyweight-mlflow", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        return self._runs.run_id if self._runs else None

    @property
    def requests(self) -> int:
        """Requests sent to the server since the search's run was found or created."""
        return self._runs.requests if self._runs else 0

    def wait_run_id(self, timeout_s: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._runs is not None or self._done, timeout_s)
        return self.run_id

    def wait_delivered(self, timeout_s: float) -> bool:
        """Waits until no entry is under way; False when that took longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._held == 0, timeout_s)

    def wait_opened(self, timeout_s: float) -> None:
        """Waits until the server has answered or failed to: a process that ends while it makes a
        database leaves one that nobody can use, nor make anew."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._runs is not None or self._outage is not None or self._done, timeout_s
            )

    def record(self, entry: Entry) -> None:
        with self._changed:
            if self._done or self._ending is not None:
                self._leave_out(1, LATE)
            elif self._held >= self._capacity:
                self._leave_out(1, f"more than {self._capacity} entries waited")
            else:
                self._held += 1
                self._inbox.append(entry)
                self._changed.notify_all()

    def finish(
        self, status: Status, files: Iterable[Path] = (), timeout_s: float = 30.0
    ) -> Undelivered:
        with self._changed:
            if self._ending is None:
                self._ending = (status, tuple(files))
                self._changed.notify_all()
            in_time = self._changed.wait_for(lambda: self._done, timeout_s)
            self._abandoned = True
            self._changed.notify_all()
            return self._undelivered(in_time)

    def _undelivered(self, in_time: bool) -> Undelivered:
        reasons = [f"{count} entries: {why}" for why, count in self._left_out.items()]
        if not in_time:
            reasons.append(self._outage or NOT_IN_TIME)
        if self._runs and self._runs.complaint:
            reasons.append(self._runs.complaint)
        count = self._held + sum(self._left_out.values())
        return Undelivered(count, self._clean("; ".join(reasons)) if reasons else None)

    def _clean(self, text: str) -> str:
        return redact(text, self._where[0])

    def _text(self, error: Exception) -> str:
        """One line of an error; cleaned before it is cut, a cut URI could hide its password."""
        return self._clean(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]

    def _leave_out(self, count: int, why: str) -> None:
        if why not in self._left_out and len(self._left_out) >= _REASONS:
            why = "other reasons"
        self._left_out[why] = self._left_out.get(why, 0) + count

    # What follows runs in the writer thread.

    def _run(self) -> None:
        try:
            if runs := self._open():
                self._deliver_all(runs)
        except Exception as error:  # of any kind: a tracker never fails a search
            why = f"MLflow cannot be used: {self._text(error)}"
            _log.warning("%s; the search goes on without it", why)
            with self._changed:
                self._leave_out(self._held, why)
                self._held = 0
                if not sum(self._left_out.values()):
                    self._left_out[why] = 0  # the run's end did not arrive
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _open(self) -> "Runs | None":
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # MLflow takes seconds to import and a new database seconds to set up: not the search's.
        from .mlflow_runs import Runs

        runs = self._until_it_works(lambda: Runs(*self._where, clean=self._clean))
        with self._changed:
            self._runs = runs
            self._changed.notify_all()
        return runs

    def _deliver_all(self, runs: "Runs") -> None:
        waiting: dict[int | None, list[Update]] = {}
        while not self._abandoned:
            ending = self._take(runs, waiting)
            self._deliver_round(runs, waiting)
            if ending and not waiting:
                self._until_it_works(partial(runs.close, *ending))
                return

    def _take(
        self, runs: "Runs", waiting: "dict[int | None, list[Update]]"
    ) -> tuple[Status, tuple[Path, ...]] | None:
        """Moves what was recorded to ``waiting``; returns how to end, when it is time to."""
        with self._changed:
            if not waiting:
                self._changed.wait_for(lambda: self._inbox or self._stops)
            self._changed.wait_for(lambda: self._stops, self._linger_s)
            entries, self._inbox, ending = self._inbox, [], self._ending
        for entry in entries:
            try:
                update = runs.update(entry)
            except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
                self._settle(1, f"not an entry of the record: {self._text(error)}")
            else:
                waiting.setdefault(update.trial, []).append(update)
        return ending

    @property
    def _stops(self) -> bool:
        return self._abandoned or self._ending is not None

    def _deliver_round(self, runs: "Runs", waiting: "dict[int | None, list[Update]]") -> None:
        from .mlflow_runs import may_pass

        for trial in list(waiting):
            if self._abandoned:
                return
            with self._changed:
                complete = not self._left_out
            try:
                runs.deliver(trial, waiting[trial], complete)
            except Exception as error:
                if may_pass(error):
                    # To the back: a run that the server chokes on must not hold up the others.
                    waiting[trial] = waiting.pop(trial)
                    self._back_off(error)
                    return
                self._settle(len(waiting.pop(trial)), f"refused: {self._text(error)}")
            else:
                self._settle(len(waiting.pop(trial)))

    def _settle(self, count: int, refused: str | None = None) -> None:
        with self._changed:
            self._held -= count
            if refused:
                self._leave_out(count, refused)
            else:
                self._recover()
            self._changed.notify_all()
        if not refused:
            self._delivered(count)

    def _until_it_works(self, step: Callable[[], T]) -> T | None:
        from .mlflow_runs import may_pass

        while not self._abandoned:
            try:
                result = step()
            except Exception as error:
                if not may_pass(error):
                    raise
                self._back_off(error)
            else:
                self._recover()
                return result
        return None

    def _back_off(self, error: Exception) -> None:
        with self._changed:
            if self._outage is None:
                _log.warning(
                    "MLflow does not answer; the record keeps what it lacks: %s", self._text(error)
                )
            self._outage = f"MLflow does not answer: {self._text(error)}"
            self._changed.notify_all()
            hurried = self._stops
            self._changed.wait_for(
                lambda: self._abandoned or self._stops != hurried,
                _FIRST_DELAY_S if hurried else self._delay_s,
            )
            self._delay_s = min(2 * self._delay_s, _LAST_DELAY_S)

    def _recover(self) -> None:
        with self._changed:
            if self._outage:
                _log.info("MLflow answers again")
            self._delay_s, self._outage = _FIRST_DELAY_S, None


def redact(text: str, uri: str = "") -> str:
    """``text`` without the user and password of any URI in it, nor that of ``uri`` anywhere."""
    user_info = uri.partition("://")[2].rpartition("@")[0]
    password = user_info.partition(":")[2]
    if password:  # also where a message names it apart from its URI
        text = text.replace(password, "***")
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"(?i)\b(\w*(?:password|passwd|token|secret|key)|sig)=[^&\s;]+", r"\1=***", text)
