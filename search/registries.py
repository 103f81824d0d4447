"""Which registry is meant: the one that is named, else where ``deploy`` registered last."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..spaces import BadInput
from .remembered import recall, remember
from .spec import absolute_uri
from .tracking import ENVIRONMENT

if TYPE_CHECKING:
    from .registry import Registered, Registry

_KEPT = "registries"  # by which the addresses are remembered, by the name of the model


def rollback(
    name: str, *, alias: str = "champion", tracking_uri: str | None = None
) -> "Registered":
    """Gives ``alias`` back to the version that had it before. Raises BadInput if none had."""
    return registry_of(name, alias, tracking_uri).roll_back()


def registry_of(name: str, alias: str, uri: str | None) -> "Registry":
    """The registered model at ``uri``; without it where MLFLOW_TRACKING_URI says, else where a
    model of that name was registered last from here. Raises BadInput."""
    uri = uri or usual_uri(name)
    if not uri:
        raise BadInput(
            f"where is {name!r} registered? Give --tracking-uri or set MLFLOW_TRACKING_URI: from "
            "here it was deployed nowhere, or to an address with a password, which is not kept; "
            f"`flyweight deploy RUN_DIR --name {name}` registers an artifact"
        )
    file = re.match(r"sqlite(?:\+\w+)?:///(?!file:)([^?]+)", uri)
    if file and not Path(file[1]).exists():  # opening it would make it
        raise BadInput(
            f"there is no MLflow database {Path(file[1]).resolve()}, so {name!r} is not registered "
            f"there; `flyweight deploy RUN_DIR --name {name}` registers an artifact, and says where"
        )
    return open_registry(name, alias, uri)


def usual_uri(name: str) -> str | None:
    """Where ``registry_of`` looks for a model of that name unless it is told."""
    return os.environ.get("MLFLOW_TRACKING_URI") or recall(_KEPT).get(name)


def open_registry(name: str, alias: str, uri: str) -> "Registry":
    """The registered model at ``uri``. Raises BadInput."""
    for variable, value in ENVIRONMENT.items():  # before MLflow, which takes seconds, is imported
        os.environ.setdefault(variable, value)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from .registry import Registry

    return Registry(uri, name, alias)


def remember_registry(name: str, uri: str) -> None:
    """``registry_of`` shall find it there."""
    remember(_KEPT, recall(_KEPT) | {name: absolute_uri(uri, Path.cwd())})
