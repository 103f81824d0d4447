"""Compression: a task and a policy to a candidate, a candidate to an artifact. Knows no search."""

from ..spaces.parameter import RUNGS
from .checkpoint import load_candidate, save_candidate
from .compress import Candidate, compress
from .parity import Parity
from .prepared import Prepared, Schedule, prepare
from .sensitivity import harm
from .task import ClassificationTask, Task, load_task
from .untrained import untrained

__all__ = [
    "RUNGS", "Candidate", "ClassificationTask", "Parity", "Prepared", "Schedule", "Task",
    "compress", "harm", "load_candidate", "load_task", "prepare", "save_candidate", "untrained",
]  # fmt: skip
