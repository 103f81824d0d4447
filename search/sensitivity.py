"""The sensitivity table: what each single choice of a space harms, applied alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from ..spaces import Parameter, Policy, Space

# Shares of channels kept at which a group is looked at, in this order: if the time is over earlier,
# every group was looked at in the middle.
SHARES = (0.5, 0.0, 0.25, 0.75)
HALF = 0.5


class Judge(Protocol):
    """Who says what policies harm (``compressors.harm``)."""

    def __call__(
        self, policies: Sequence[Policy], recalibrated: bool = False
    ) -> Sequence[float | None]:
        """In their order; None for what could not be built, or not in time."""


@dataclass(frozen=True)
class Sensitivity:
    """harm: by axis and choice, KL to the teacher in nats on search validation, above that of the
    student otherwise untouched (but for statistics that are recomputed where channels go); 0 for
    what leaves it untouched. settings: the values of criterion,
    reconstruct and calibration that harmed least, with which all was judged. students: what each
    student harms as it is. judged: how many of the ``choices`` that are looked at alone were; the
    rest is interpolated, or taken to be as usual."""

    harm: Mapping[str, Mapping[Any, float]]
    settings: Mapping[str, Any]
    students: Mapping[str, float]
    judged: int
    choices: int

    def of(self, axis: Parameter) -> list[float]:
        """What each choice of ``axis`` harms."""
        return [self.harm[axis.name][choice] for choice in axis.choices]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: choices as text."""
        named = {a: {str(c): h for c, h in known.items()} for a, known in self.harm.items()}
        return {
            "harm": named, "settings": dict(self.settings), "students": dict(self.students),
            "judged": self.judged, "choices": self.choices,
        }  # fmt: skip


def axes_of(space: Space) -> tuple[Parameter, ...]:
    """The axes whose choices are judged alone: of every block, group and layer."""
    return tuple(axis for axis in space.axes if axis.name != "student")


def measure(space: Space, judge: Judge) -> Sensitivity:
    """Has ``judge`` look at single choices, what matters most first, and fills in the rest.

    The harm of a group is taken to grow with the square of the channels removed, as that of any
    small change does (Taylor, second order: the teacher is a minimum of the KL to itself), and
    never to shrink.
    """
    choices = 0

    def ask(values: Sequence[Mapping[str, Any]], recalibrated: bool = False) -> list[float | None]:
        return list(judge([space.policy(v) for v in values], recalibrated))

    settings = _settings(space, ask)
    names = list(space.networks)
    as_they_are = [{**settings, "student": name} for name in names]
    plain, recalibrated = (
        dict(zip(names, ask(as_they_are, how), strict=True)) for how in (False, True)
    )
    if plain.get("pruned", 0.0) is None:  # no time for it: untouched, it answers as it does
        plain["pruned"] = 0.0
    known: dict[str, dict[Any, float]] = {}
    for level in range(len(SHARES)):
        wanted = [
            (axis, choice)
            for axis in axes_of(space)
            for choice in _choices(axis, level)
            if plain[axis.student or names[0]] is not None
        ]
        choices += len(wanted)
        values = [
            {**settings, "student": a.student or names[0], a.name: choice} for a, choice in wanted
        ]
        for (axis, choice), found in zip(wanted, ask(values), strict=True):
            if found is not None:
                student = axis.student or names[0]
                base = plain[student]
                if not axis.name.startswith("precision/"):
                    base = recalibrated[student] or base
                known.setdefault(axis.name, {})[choice] = max(0.0, found - (base or 0.0))
    harm = {axis.name: _filled(space, axis, known) for axis in axes_of(space)}
    students = {name: base for name, base in plain.items() if base is not None}
    judged = sum(map(len, known.values()))
    return Sensitivity(harm, settings, students, judged, choices)


def _settings(space: Space, ask: Callable[..., list[float | None]]) -> dict[str, Any]:
    """Criterion, reconstruct and calibration that harm a uniform recipe least."""
    choices = {p.name: p.choices for p in space.parameters}
    pruned = space.values(space.uniform(HALF))
    int8 = space.values(space.uniform(1.0, "int8"))
    wanted = [
        (pruned, {"criterion": criterion, "reconstruct": reconstruct})
        for criterion in choices["criterion"]
        for reconstruct in choices["reconstruct"]
    ]
    wanted += [(int8, {"calibration": calibration}) for calibration in choices["calibration"]]
    found = ask([recipe | settings for recipe, settings in wanted])
    out: dict[str, Any] = {}
    for recipe in (pruned, int8):
        known = [
            (harm, settings)
            for (which, settings), harm in zip(wanted, found, strict=True)
            if which is recipe and harm is not None
        ]
        if known:
            out |= min(known, key=lambda pair: pair[0])[1]
    return out


def _choices(axis: Parameter, level: int) -> list[Any]:
    """The choices of ``axis`` that are judged at ``level``."""
    if not axis.name.startswith("width/"):
        return [c for c in axis.choices if c not in (False, "fp32")] if level == 0 else []
    full = axis.choices[-1]
    seen = [min(axis.choices, key=lambda w: abs(w - share * full)) for share in SHARES]
    return [] if seen[level] in (*seen[:level], full) else [seen[level]]


def _filled(
    space: Space, axis: Parameter, known: Mapping[str, Mapping[Any, float]]
) -> dict[Any, float]:
    """The harm of every choice of ``axis``."""
    mine = known.get(axis.name, {})
    kind = axis.name.partition("/")[0]
    if kind != "width":
        others = [
            h for name, found in known.items() if name.startswith(kind) for h in found.values()
        ]
        usual = median(others) if others else 0.0
        untouched = {False, "fp32"}
        return {c: 0.0 if c in untouched else mine.get(c, usual) for c in axis.choices}
    full = axis.choices[-1]
    # (share of channels removed, square root of the harm), from untouched to the most removed.
    points = [(1 - width / full, math.sqrt(h)) for width, h in mine.items()]
    if not points:  # as the usual group
        points = [(HALF, _usual(space, known))]
    removed, roots = map(np.array, zip((0.0, 0.0), *sorted(points), strict=True))
    roots = np.maximum.accumulate(roots)
    slope = roots[-1] / max(removed[-1], 1e-9)
    out = {}
    for width in axis.choices:
        gone = 1 - width / full
        root = np.interp(gone, removed, roots) if gone <= removed[-1] else slope * gone
        out[width] = float(root) ** 2
    return out


def _usual(space: Space, known: Mapping[str, Mapping[Any, float]]) -> float:
    """The square root of the harm of the usual group with half its channels."""
    slopes = [
        math.sqrt(h) / (1 - width / full)
        for name, found in known.items() if name.startswith("width/")
        for full in [space.widths[name.partition("/")[2]][-1]]
        for width, h in found.items()
    ]  # fmt: skip
    return HALF * median(slopes) if slopes else 1.0
