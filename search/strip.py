"""The chosen policy beside its neighbours on the front, layer by layer: what was chosen, what it
costs in time and what it harms, so that one sees why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .explained import Found, places_of, time_of
from .fragile import Harms
from .reading import Policy, Row, Run

_SETTINGS = (
    ("prune", "criterion"), ("prune", "reconstruct"), ("prune", "sparsity"), ("prune", "drop"),
    ("quantize", "calibration"), ("quantize", "qat"),
    ("distill", "student"), ("distill", "loss"), ("distill", "temperature"), ("distill", "alpha"),
    ("distill", "learning_rate"),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A layer in one policy. kept: share of its channels. width: "" where it is not known."""

    kept: float
    width: str
    precision: str
    differs: bool


@dataclass(frozen=True)
class Line:
    """A layer: its cells, policy by policy; the chosen one's time and the teacher's, in ms; what
    its width and its precision harm alone, in nats. "" where it is not known."""

    name: str
    cells: Sequence[Cell]
    ms: str
    teacher_ms: str
    width_harm: str
    precision_harm: str


@dataclass(frozen=True)
class Strip:
    """rows: the policies, by ascending latency. settings: what else they say, by name."""

    rows: Sequence[Row]
    lines: Sequence[Line]
    settings: Sequence[tuple[str, Sequence[str]]]


def strip(run: Run) -> Strip | None:
    """The chosen policy between the next faster and the next slower one on the front that start
    from the same student. None where nothing is chosen or known of its layers."""
    chosen = run.chosen
    if chosen is None or chosen.policy is None:
        return None
    same = [row for row in run.front if row.policy and _student(row.policy) == _student(
        chosen.policy)]  # fmt: skip
    at = same.index(chosen)
    rows = same[max(0, at - 1) : at + 2]
    found = run.found if run.found and run.found["digest"] == chosen.figures.digest else None
    layers = _layers(run, rows, found)
    if not layers:
        return None
    times = {k["name"]: k for k in found["kernels"]} if found else {}
    full = _full(run, found, _student(chosen.policy))
    policies = [row.policy or {} for row in rows]
    lines = [
        _line(name, group, policies, policies[rows.index(chosen)], full, times, run)
        for name, group in layers.items()
    ]
    return Strip(rows, lines, _settings(policies))


def _line(
    name: str, group: str | None, policies: Sequence[Policy], chosen: Policy,
    full: Mapping[str, int], times: Mapping[str, Found], run: Run,
) -> Line:  # fmt: skip
    here = _cell(name, group, chosen, chosen, full, run)
    kernel = times.get(name, {})
    places = places_of(run.found["predicted_latency_ms"][1]) if run.found else 0
    student = _student(chosen)
    whose = "" if student == "pruned" else f"{student}:"
    harms = run.harms or {}
    return Line(
        name,
        [_cell(name, group, policy, chosen, full, run) for policy in policies],
        _time(kernel, "", places),
        _time(kernel, "teacher_", places),
        _harm(harms, f"width/{whose}{group}", here.width if group == name else ""),
        _harm(harms, f"precision/{whose}{name}", "int8"),
    )


def _time(kernel: Found, whose: str, places: int) -> str:
    """Without how sure it is, for which a strip has no room."""
    ms, deviation = kernel.get(f"{whose}ms"), kernel.get(f"{whose}deviation_ms")
    return time_of(ms, deviation, places).partition(" ")[0]


def _layers(run: Run, rows: Sequence[Row], found: Found | None) -> dict[str, str | None]:
    """The group of each layer's channels, in execution order as far as that is known."""
    if found:
        return {layer["name"]: layer["group"] for layer in found["layers"]}
    if (known := run.search.get("layer_groups")) and _student(rows[0].policy) == "pruned":
        return dict(known)
    names: dict[str, str | None] = {}
    for row in rows:
        policy = row.policy or {}
        names |= {name: name for name in policy.get("prune", {}).get("width", {})}
        chosen = policy.get("quantize", {}).get("precision", {})
        names |= {name: None for name in chosen if name not in names}
    return names


def _full(run: Run, found: Found | None, student: str) -> dict[str, int]:
    """The width of each group at first."""
    if found:
        return {group["name"]: group["full_width"] for group in found["groups"]}
    return dict(run.search.get("groups") or {}) if student == "pruned" else {}


def _cell(
    name: str, group: str | None, policy: Policy, chosen: Policy, full: Mapping[str, int], run: Run
) -> Cell:
    mine, its = (_choice(name, group, p, full, run) for p in (policy, chosen))
    width, precision = mine
    most = full.get(group or "")
    kept = width / most if most and width is not None else 1.0
    return Cell(kept, "" if width is None else str(width), precision, mine != its)


def _choice(
    name: str, group: str | None, policy: Policy, full: Mapping[str, int], run: Run
) -> tuple[int | None, str]:
    prune = policy.get("prune", {})
    for block in prune.get("drop", ()):
        if group in (run.search.get("blocks") or {}).get(block, ()) or block == name:
            return 0, "dropped"
    width = prune.get("width", {}).get(group, full.get(group or ""))
    return width, policy.get("quantize", {}).get("precision", {}).get(name, "fp32")


def _harm(harms: Harms, axis: str, choice: str) -> str:
    harm = harms.get(axis, {}).get(choice)
    return "" if harm is None else f"{max(harm, 0.0):.2g}"


def _settings(policies: Sequence[Policy]) -> list[tuple[str, list[str]]]:
    out = []
    for section, key in _SETTINGS:
        values = [_word(policy.get(section, {}).get(key)) for policy in policies]
        if any(values):
            out.append((f"{section}.{key}", values))
    return out


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(value) if isinstance(value, list) else str(value or "")


def _student(policy: Policy | None) -> str:
    return str((policy or {}).get("distill", {}).get("student", "pruned"))
