"""What one search learned and the next can use, kept between them by the hash of its inputs."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import platformdirs

from .spec import Spec


def cache_folder(spec: Spec) -> Path:
    """Under ``storage`` if that is a folder, else FLYWEIGHT_CACHE, else the user's cache."""
    if spec.storage is not None and "://" not in spec.storage:
        return Path(spec.storage) / "cache"
    return Path(os.environ.get("FLYWEIGHT_CACHE") or platformdirs.user_cache_path("flyweight"))


def key_of(*inputs: Any) -> str:
    """16 hexadecimal digits that differ where any of ``inputs`` (of JSON, or bytes) does."""
    digest = hashlib.sha256()
    for part in inputs:
        content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


class Lines:
    """JSON lines of one file, [key, value] each, appended as they come. Losing them costs time and
    nothing else: a line that is damaged is left out, a file that cannot be written is not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, Any] = {}
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return
        for line in lines:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                continue
            self.known[key] = value

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([key, value]) + "\n")
        except OSError:
            return
