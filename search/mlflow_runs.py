"""The runs of one search in MLflow: found or created, filled, ended.

Importing this takes seconds: search/tracking.py does it in its writer thread.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import InvalidUrlException, MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from ..spaces.parameter import RUNGS
from .mlflow_entries import Update, read, status_of

T = TypeVar("T")
_LONGEST = 1000  # characters of a tag or parameter; some stores refuse more than 5000
_PAGE = 1000  # runs per page of a look-up

# The time of the newest entry that a run holds, written only as long as nothing was left out:
# what is not newer need not be sent again. It is sent after the policy and the status, with the
# metrics.
_UP_TO = "flyweight.up_to"

# Answers that will be the same next time. Anything else may pass: the server restarts, its
# database is locked, a proxy stands before it.
_FINAL = {
    "BAD_REQUEST",
    "FEATURE_DISABLED",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
}


def may_pass(error: Exception) -> bool:
    """Whether the same request may work later."""
    if isinstance(error, MlflowException):
        return error.error_code not in _FINAL and not isinstance(error, InvalidUrlException)
    if (response := getattr(error, "response", None)) is not None:  # of requests, for artifacts
        return bool(response.status_code >= 500 or response.status_code in (408, 429))
    gone = isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError)
    return isinstance(error, OSError) and not gone


@dataclass
class _Open:
    """A run as far as this process knows it."""

    run_id: str
    artifact_uri: str
    tags: dict[str, str]
    params: set[str]  # their names: what one is cannot be changed
    status: str
    found: float = -math.inf  # _UP_TO when it was found
    has_policy: bool = False

    @classmethod
    def of(cls, run: Run) -> "_Open":
        tags = dict(run.data.tags)
        return cls(
            run.info.run_id,
            run.info.artifact_uri,
            tags,
            set(run.data.params),
            run.info.status,
            found=float(tags.get(_UP_TO, "-inf")),
            has_policy="flyweight.rung" in tags,
        )

    def holds(self, update: Update) -> bool:
        return update.time <= self.found

    def tags_after(self, updates: list[Update], complete: bool) -> dict[str, str]:
        """The tags that ``updates`` set; what is not there need not be emptied."""
        tags: dict[str, str] = {}
        for update in updates:
            tags |= update.tags
            tags = {k: v for k, v in tags.items() if v or k in self.tags}
            if update.rung >= 0:
                names = tags.get("flyweight.rung") or self.tags.get("flyweight.rung")
                highest = max(update.rung, RUNGS.index(names) if names in RUNGS else -1)
                tags["flyweight.rung"] = RUNGS[highest]
        if odd := [name for update in updates for name in update.not_finite]:
            before = self.tags.get("flyweight.not_finite", "").split()
            tags["flyweight.not_finite"] = " ".join(dict.fromkeys(before + odd))
        if complete:
            tags[_UP_TO] = repr(max(self.found, *(update.time for update in updates)))
        return tags


class Runs:
    """One parent run and its children; each is looked up before it is created.

    Creating it finds or creates the experiment and the parent, and loads the children of a parent
    that was there. Raises what MLflow raises. ``clean``: removes secrets from a text.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_location: str | None,
        search_id: str,
        *,
        clean: Callable[[str], str],
    ) -> None:
        # It logs each passing error with its traceback, across the live display; we say it once.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self.requests = 0
        self.complaint: str | None = None  # the first file that could not be stored, and why
        self._uri = uri
        self._search_id = search_id
        self._clean = clean
        self._client = MlflowClient(uri)
        self._experiment_id = self._find_experiment(experiment, artifact_location)
        self._children: dict[int, _Open] = {}
        self._trials: dict[str, int] = {}  # of a digest
        self._unsure: set[int] = set()  # trials whose creation was not answered
        self._fingerprint: str | None = None
        self._stored: set[Path] = set()
        self._parent = self._find_parent()

    @property
    def run_id(self) -> str:
        return self._parent.run_id

    def update(self, entry: dict[str, Any]) -> Update:
        """What ``entry`` adds, and to which run. Raises as ``read`` does."""
        update = read(entry)
        if entry["kind"] == "search":
            self._fingerprint = update.tags.get("flyweight.fingerprint")
        elif entry["kind"] == "measured":
            if entry["digest"] not in self._trials:
                raise ValueError(f"no trial has the digest {entry['digest']}")
            update.trial = self._trials[entry["digest"]]
        elif update.trial is not None:
            self._trials[entry["digest"]] = update.trial
        return update

    def deliver(self, trial: int | None, updates: list[Update], complete: bool) -> None:
        """Sends ``updates``, in order, to the run of ``trial``: its policy if new, whether it runs,
        one batch. ``complete``: nothing was left out so far. May be repeated after any failure."""
        run = self._parent if trial is None else self._child(trial, updates)
        new = [update for update in updates if not run.holds(update)]
        if not new:
            return
        policy = next((u.policy for u in new if u.policy is not None), None)
        if policy is not None and not run.has_policy:
            self._store_policy(run, policy)
        if turns := [(update.status, update.time) for update in new if update.status is not None]:
            self._turn(run, *turns[-1])
        tags = run.tags_after(new, complete)
        # Each once, as it was first: one that is given another value has the whole batch refused.
        given = ((k, v) for u in reversed(new) for k, v in u.params.items())
        params = {k: v for k, v in given if k not in run.params}
        self._ask(
            self._client.log_batch,
            run.run_id,
            metrics=[
                Metric(name, value, round(u.time * 1000), u.step)
                for u in new
                for name, value in u.metrics.items()
            ],
            params=[Param(k, self._short(v)) for k, v in params.items()],
            tags=[RunTag(k, self._short(v)) for k, v in tags.items()],
        )
        run.tags |= tags
        run.params |= params.keys()

    def close(self, status: str, files: Iterable[Path]) -> None:
        """Stores ``files``, ends what still runs, and the search with ``status``."""
        for file in files:
            if file not in self._stored:
                self._store(self._parent, file)
                self._stored.add(file)
        for child in self._children.values():
            if child.status == "RUNNING":  # nothing runs any more: no zombies
                reason = child.tags.get("flyweight.reason") or "interrupted"
                self._turn(child, status_of(reason), time.time())
        self._turn(self._parent, status, time.time())

    def _ask(self, call: Callable[..., T], *args: Any, **named: Any) -> T:
        self.requests += 1
        return call(*args, **named)

    def _short(self, text: str) -> str:
        return self._clean(text)[:_LONGEST]

    def _turn(self, run: _Open, status: str, at: float) -> None:
        """``run`` has ended, ``at`` in seconds, or runs again."""
        if status != "RUNNING":
            self._ask(self._client.set_terminated, run.run_id, status, round(at * 1000))
        elif run.status != "RUNNING":
            self.requests += 1  # update_run makes two
            self._ask(self._client.update_run, run.run_id, status="RUNNING")
        run.status = status

    def _find_experiment(self, name: str, artifact_location: str | None) -> str:
        found = self._ask(self._client.get_experiment_by_name, name)
        if found is None:
            try:
                return self._ask(self._client.create_experiment, name, artifact_location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._ask(self._client.get_experiment_by_name, name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _find_parent(self) -> _Open:
        if found := self._search(f"tags.`flyweight.search` = '{self._search_id}'"):
            parent = _Open.of(found[0])
            self._turn(parent, "RUNNING", time.time())
            for run in self._search(f"tags.`mlflow.parentRunId` = '{parent.run_id}'"):
                self._remember(run)
            return parent
        tags = {"flyweight.search": self._search_id}
        return _Open.of(self._create(tags, self._search_id, time.time()))

    def _remember(self, run: Run) -> None:
        number = run.data.tags.get("flyweight.trial", "").rpartition("/")[2]
        if number.isdecimal():
            self._children[int(number)] = _Open.of(run)
            self._trials[run.data.tags.get("flyweight.digest", "")] = int(number)

    def _child(self, trial: int, updates: list[Update]) -> _Open:
        if trial not in self._children:
            name = f"{self._search_id}/{trial}"
            if trial in self._unsure:
                for run in self._search(f"tags.`flyweight.trial` = '{name}'"):
                    self._remember(run)
        if trial not in self._children:
            self._unsure.add(trial)
            tags = {
                "mlflow.parentRunId": self._parent.run_id,
                "flyweight.trial": name,
                "flyweight.digest": updates[0].tags.get("flyweight.digest", ""),
            }
            if self._fingerprint:
                tags["flyweight.fingerprint"] = self._fingerprint
            first = updates[0]
            started = first.time if first.started is None else first.started
            self._remember(self._create(tags, f"trial {trial}", started))
        self._unsure.discard(trial)
        return self._children[trial]

    def _create(self, tags: dict[str, str], name: str, started: float) -> Run:
        return self._ask(
            self._client.create_run,
            self._experiment_id,
            start_time=round(started * 1000),
            tags={key: self._short(value) for key, value in tags.items()},
            run_name=name,
        )

    def _search(self, condition: str) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self._ask(
                self._client.search_runs,
                [self._experiment_id],
                condition,
                max_results=_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _store_policy(self, run: _Open, policy: dict[str, Any]) -> None:
        # The canonical form: the SHA-256 of the file is the digest of the policy.
        text = json.dumps(policy, sort_keys=True, separators=(",", ":"))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "policy.json"
            file.write_text(text)
            self._store(run, file)
        run.has_policy = True

    def _store(self, run: _Open, file: Path) -> None:
        """Stores a file; one that will never be taken is complained of, and costs no metric."""
        try:
            # The client's log_artifact would ask for the run first: one more request a trial.
            store = get_artifact_repository(run.artifact_uri, tracking_uri=self._uri)
            self._ask(store.log_artifact, str(file))
        except Exception as error:
            if may_pass(error):
                raise
            text = f"{file.name} was not stored: {type(error).__name__}: {error}"
            self.complaint = self.complaint or " ".join(text.split())
