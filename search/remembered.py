"""What a command was told last, for those that are not told again: where a job runs, where a model
is registered. Small files in the user's state folder; losing them costs an option."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from .storage import write_whole
from .tracking import redact

_log = logging.getLogger(__name__)


def recall(what: str) -> dict[str, str]:
    """What ``remember`` kept; empty if that is nothing."""
    try:
        found = json.loads(_place(what).read_text())
    except (OSError, ValueError):
        return {}
    return {k: str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def remember(what: str, values: Mapping[str, str]) -> None:
    """Keeps ``values`` in place of what was kept before, but for those with a password in them,
    which is not for a file."""
    known = {name: value for name, value in values.items() if redact(value) == value}
    try:
        write_whole(_place(what), (json.dumps(known, indent=2) + "\n").encode())
    except OSError as error:
        _log.warning("%s is not remembered: %s", what, error)


def _place(what: str) -> Path:
    return platformdirs.user_state_path("flyweight") / f"{what.replace(' ', '-')}.json"
