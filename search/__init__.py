"""The search: from a spec to a front of measured artifacts, on one machine or a cluster."""

import os
from typing import TYPE_CHECKING, Any

# Ray reads these when it is imported. Its ports listen on all interfaces even for a local search;
# a token is what protects them. Tune: no loggers of its own, no checks of metrics we do not use.
for _name, _value in (
    ("RAY_AUTH_MODE", "token"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("RAY_AIR_NEW_OUTPUT", "0"),
    ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1"),
    ("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1"),
):
    os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from .notebook import Results, load_run, search

__all__ = ["Results", "load_run", "search"]


def __getattr__(name: str) -> Any:
    # Not before they are asked for: the command line, and the process that verifies a model
    # without torch, import this too.
    if name in __all__:
        from . import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
