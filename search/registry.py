"""The MLflow model registry: a verified artifact becomes a version, and last of all gets a name.

Importing this takes seconds: search/registries.py does it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import RunInfo
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from ..spaces import BadInput, FlyweightError, nearest
from .choose import Artifact
from .mlflow_model import DIGEST, SHA256, TASK, log_model, tags
from .registry_errors import reason
from .tracking import files_beside, redact

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # as MLflow takes them


@dataclass(frozen=True)
class Registered:
    """version: that the alias names now. previous: that it named before, None if none."""

    version: str
    previous: str | None
    reused: bool


class Registry:
    """One registered model at one server, and the alias to set. All methods raise FlyweightError
    with the server's address (without its password) where MLflow fails, and
    BadInput for a name or an alias that MLflow would not take."""

    def __init__(self, uri: str, name: str, alias: str) -> None:
        if not re.fullmatch(r"[\w.-]+", name):
            raise BadInput(f"a model's name is of letters, digits and _.- but got {name!r}")
        if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"(?i)latest|v\d+|\d+", alias):
            raise BadInput(
                "an alias is of letters, digits and _- and neither 'latest' nor a version, but got "
                f"{alias!r}"
            )
        self.uri, self.name, self.alias = uri, name, alias
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # we say it once
        with self._telling():
            _open(uri)
            self._client = MlflowClient(uri)

    def check(self, task: str, force: bool) -> None:
        """Raises BadInput if the name belongs to another task, unless ``force``."""
        with self._telling():
            model = self._model()
        if model is None or force or (owner := model.tags.get(TASK)) == task:
            return
        whose = f"the task {owner}" if owner else "something that flyweight did not register"
        raise BadInput(
            f"the registered model {self.name!r} is of {whose}, not of {task}; give another "
            "--name, or --force to add to it all the same"
        )

    def register(self, artifact: Artifact, run_id: str | None, experiment: str) -> Registered:
        """A version that holds ``artifact``, found or made, checked, then given the alias."""
        with self._telling(), _at(self.uri):
            version = self._find(artifact)
            reused = version is not None
            if version is None:
                version = self._create(artifact, run_id, experiment)
            self._check_stored(version, artifact)
            number, previous = str(version.version), self._current()
            if previous != number:
                # Where to go back to; the version that has it already keeps what it remembers.
                self._client.set_model_version_tag(
                    self.name, number, f"flyweight.previous.{self.alias}", previous or ""
                )
                self._client.set_registered_model_alias(self.name, self.alias, number)
        return Registered(number, previous, reused)

    def roll_back(self) -> Registered:
        """Gives the alias back to the version that had it before. Raises BadInput if none had."""
        with self._telling():
            current = self._current()
            if current is None:
                raise BadInput(self._unknown())
            version = self._client.get_model_version(self.name, current)
            before = version.tags.get(f"flyweight.previous.{self.alias}")
            if not before:
                raise BadInput(
                    f"{self.name!r}: {self.alias!r} had no version before {current}, so there is "
                    f"none to go back to; `flyweight deploy RUN_DIR --alias {self.alias}` gives it "
                    "to another"
                )
            self._client.get_model_version(self.name, before)  # it may have been deleted
            self._client.set_registered_model_alias(self.name, self.alias, before)
        return Registered(str(before), str(current), True)

    def current(self) -> str:
        """The version that the alias names. Raises BadInput if there is none."""
        with self._telling():
            version = self._current()
        if version is None:
            raise BadInput(self._unknown())
        return version

    def fetch(self, version: str) -> tuple[bytes, dict[str, Any]]:
        """The model of ``version``, as it was verified, and its metrics.json."""
        with self._telling(), _at(self.uri), tempfile.TemporaryDirectory() as folder:
            found = self._client.get_model_version(self.name, version)
            if not (found.run_id and found.tags.get(DIGEST) and found.tags.get(SHA256)):
                raise BadInput(
                    f"version {version} of {self.name!r} was not registered by flyweight, so "
                    "nothing says what it should be; register with flyweight deploy"
                )
            model = mlflow.artifacts.download_artifacts(
                f"models:/{self.name}/{version}/model.onnx", dst_path=folder
            )
            place = f"deployed/{found.tags[DIGEST][:12]}/metrics.json"
            metrics = self._client.download_artifacts(found.run_id, place, folder)
            try:
                facts = json.loads(Path(metrics).read_text())
                return Path(model).read_bytes(), {**facts, "sha256": found.tags[SHA256]}
            except (ValueError, TypeError) as error:
                raise FlyweightError(f"metrics.json of version {version} is damaged") from error

    def _model(self) -> RegisteredModel | None:
        try:
            return self._client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _current(self) -> str | None:
        model = self._model()
        version = None if model is None else model.aliases.get(self.alias)
        return None if version is None else str(version)

    def _unknown(self) -> str:
        """That no version has the alias, and which there are."""
        with self._telling():
            model = self._model()
            names = [m.name for m in self._client.search_registered_models()]
        known = nearest(self.alias, model.aliases) if model else nearest(self.name, names)
        return (
            f"no version of {self.name!r} has the alias {self.alias!r} at {redact(self.uri)} "
            f"({known}); `flyweight deploy RUN_DIR --name {self.name} --alias {self.alias}` "
            "registers one"
        )

    def _find(self, artifact: Artifact) -> ModelVersion | None:
        # The digest alone is of the policy: another seed gives another model.
        found = self._client.search_model_versions(
            f"name = '{self.name}' AND tags.`{SHA256}` = '{artifact.metrics['sha256']}'"
        )
        same = [v for v in found if v.tags.get(DIGEST) == artifact.digest]
        return max(same, key=lambda v: int(v.version), default=None)

    def _create(self, artifact: Artifact, run_id: str | None, experiment: str) -> ModelVersion:
        with self._run(run_id, experiment, artifact) as run:
            model_id = log_model(self._client, run, artifact)
            for name in ("policy.json", "metrics.json"):
                file = artifact.path.with_name(name)
                place = f"deployed/{artifact.digest[:12]}"
                self._client.log_artifact(run.run_id, str(file), place)
        # Only now, when all of it is stored, does anything stand in the registry.
        model = self._model()
        try:
            if model is None:
                self._client.create_registered_model(self.name, {TASK: artifact.task})
            elif model.tags.get(TASK) != artifact.task:
                self._client.set_registered_model_tag(self.name, TASK, artifact.task)
            return self._client.create_model_version(
                self.name,
                f"models:/{model_id}",
                run_id=run.run_id,
                tags=tags(artifact),
                model_id=model_id,
            )
        except BaseException:
            if model is None:  # an empty one would be half of something
                with contextlib.suppress(Exception):
                    self._client.delete_registered_model(self.name)
            raise

    @contextlib.contextmanager
    def _run(self, run_id: str | None, experiment: str, artifact: Artifact) -> Iterator[RunInfo]:
        """The search's run if the server has it, as it is; else a new one, ended afterwards."""
        if run_id is not None and (found := self._find_run(run_id)) is not None:
            yield found
            return
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._create_experiment(experiment)
        new = self._client.create_run(number, run_name=f"deploy {artifact.digest[:12]}").info
        try:
            yield new
        except BaseException:
            with contextlib.suppress(Exception):
                self._client.set_terminated(new.run_id, "FAILED")
            raise
        self._client.set_terminated(new.run_id)

    def _create_experiment(self, name: str) -> str:
        place = files_beside(self.uri)
        return str(self._client.create_experiment(name, str(place) if place else None))

    def _find_run(self, run_id: str) -> RunInfo | None:
        try:
            found = self._client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return found if found.lifecycle_stage == "active" else None

    def _check_stored(self, version: ModelVersion, artifact: Artifact) -> None:
        """What the registry gives must be what was verified, whatever lies between."""
        with tempfile.TemporaryDirectory() as folder:
            uri = f"models:/{self.name}/{version.version}"
            got = mlflow.artifacts.download_artifacts(f"{uri}/model.onnx", dst_path=folder)
            found = hashlib.sha256(Path(got).read_bytes()).hexdigest()
        if found != artifact.metrics["sha256"]:
            raise FlyweightError(
                f"{uri} holds another file than the one that was verified (SHA-256 {found}); it "
                f"did not get the alias {self.alias!r}"
            )

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
            where, why = redact(self.uri), redact(reason(error), self.uri)
            raise FlyweightError(f"the MLflow registry at {where} failed: {why}") from None


def _open(uri: str) -> None:
    """Opens the database that ``uri`` may name: MLflow (3.17) would try for a hundred seconds."""
    if uri.partition(":")[0].partition("+")[0] in DATABASES:
        engine = create_engine(uri)
        engine.connect().close()
        engine.dispose()


@contextlib.contextmanager
def _at(uri: str) -> Iterator[None]:
    """MLflow's logging functions know only a global address: set, and put back."""
    before, told = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # which also says so to who reads the variable
        if told is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
