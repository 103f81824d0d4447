"""A task of the user's own process, such as a notebook, as it travels to Ray's workers."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle


@dataclass(frozen=True)
class LiveTask:
    """A pickled task. It goes through the object store of a Ray whose token this process made or
    was given, and is never written to a file (DESIGN decision 11). paths: where this process finds
    modules, for what is pickled by name."""

    content: bytes
    paths: tuple[str, ...]

    @classmethod
    def of(cls, task: Any) -> "LiveTask":
        """Raises what pickle raises for a task that cannot travel."""
        paths = (str(Path(path).resolve()) for path in sys.path)  # "" is where one is now
        return cls(cloudpickle.dumps(task), tuple(dict.fromkeys(paths)))

    def load(self) -> Any:
        """A copy of the task."""
        sys.path += [path for path in self.paths if path not in sys.path]
        return cloudpickle.loads(self.content)
