"""The exceptions of flyweight.

FlyweightError
├── BadInput        the user's input breaks a rule; nothing was spent (exit code 2)
│   └── Untraceable the model cannot be traced; names the operation
└── Impossible      this policy cannot be built, trained or run: the trial fails, the search goes on
"""

import difflib
from collections.abc import Iterable


class FlyweightError(Exception):
    """Base of every error that flyweight raises on purpose."""


class BadInput(FlyweightError):
    """The user's input breaks a rule. The message names the rule, the value and the fix."""


class Untraceable(BadInput):
    """The model cannot be traced. The message names the operation."""


class Impossible(FlyweightError):
    """This candidate is not possible; the search records why and goes on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown ``word``: the nearest known one, else all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices) or 'none'}"
