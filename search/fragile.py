"""Which parts of a network are fragile: the sensitivity table of a run as sheets."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..spaces import BadInput
from .explained import Sheet, print_sheet
from .run_files import SENSITIVITY
from .store import read_policy, run_of

HALF = 0.5

Harms = Mapping[str, Mapping[str, float]]  # by axis, by choice as text


def read_harms(run_dir: Path) -> Harms | None:
    """The table of a run, None if it has none, or one in which nothing was judged: all in it is
    assumed. Raises BadInput for what is no table."""
    path = run_dir / SENSITIVITY
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text("utf-8"))
        harms = table["harm"]
        if not table.get("judged", 1):
            return None
        return {axis: {c: float(h) for c, h in known.items()} for axis, known in harms.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path} is no sensitivity table: {error!r}") from error


def how_judged(run_dir: Path) -> str:
    """How much of the table of a run was judged, where that was not all; a sentence, or ""."""
    try:
        table = json.loads((run_dir / SENSITIVITY).read_text("utf-8"))
        judged, choices = int(table["judged"]), int(table["choices"])
    except (OSError, ValueError, TypeError, KeyError):  # of a run before these were counted
        return ""
    rest = "the rest is estimated from those"
    return f"{judged} of {choices} choices were judged, {rest}." if judged < choices else ""


def print_fragile(policy_path: Path, console: Console | None = None) -> None:
    """What the choices of a policy in the artifacts of a run harm; nothing for any other policy."""
    run = run_of(policy_path)
    harms = read_harms(run) if run else None
    if run is not None and harms is not None:
        console, policy = console or Console(emoji=False), read_policy(policy_path).to_dict()
        for sheet in (groups_sheet(harms, policy), layers_sheet(harms, policy)):
            print_sheet(sheet, console)
        if said := how_judged(run):
            console.print(said, highlight=False, soft_wrap=True)


def groups_sheet(harms: Harms, policy: Mapping[str, Any] | None) -> Sheet:
    """For each group what its width in ``policy`` harms, half of its channels, and the least."""
    kept = (policy or {}).get("prune", {}).get("width", {})
    rows: list[tuple[float, list[str]]] = []
    for name, known in _axes(harms, "width/", policy):
        widths = sorted(map(int, known))
        width = kept.get(name, widths[-1])
        half = min(widths, key=lambda w: abs(w - HALF * widths[-1]))
        shown = [f"{w}: {_nats(known[str(w)])}" for w in (half, widths[0])]
        here = _nats(known.get(str(width), 0.0))
        row = [name, f"{width} of {widths[-1]}", here, *shown]
        rows.append((known[str(half)], row))
    columns = ("group", "width", "harms, nats", "at half", "at least")
    return Sheet("Groups, the most fragile first", columns, 1, _sorted(rows))


def layers_sheet(harms: Harms, policy: Mapping[str, Any] | None) -> Sheet:
    """For each layer what int8 harms, and each block what its drop does, with what was chosen."""
    chosen = (policy or {}).get("quantize", {}).get("precision", {})
    dropped = (policy or {}).get("prune", {}).get("drop", ())
    rows: list[tuple[float, list[str]]] = []
    for name, known in _axes(harms, "precision/", policy):
        if "int8" in known:
            rows.append((known["int8"], [name, chosen.get(name, "fp32"), _nats(known["int8"])]))
    for name, known in _axes(harms, "drop/", policy):
        gone = "dropped" if name in dropped else "kept"
        rows.append((known["True"], [name, gone, _nats(known["True"])]))
    columns = ("layer or block", "chosen", "int8, or its drop, harms, nats")
    return Sheet("Layers, the most fragile first", columns, 2, _sorted(rows))


def _axes(
    harms: Harms, kind: str, policy: Mapping[str, Any] | None
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """The axes of a kind of the student of ``policy``, by the names that the policy uses."""
    student = (policy or {}).get("distill", {}).get("student", "pruned")
    for axis, known in harms.items():
        whose, _, name = axis.removeprefix(kind).rpartition(":")
        if axis.startswith(kind) and len(known) > 1 and (whose or "pruned") == student:
            yield name, known


def _sorted(rows: list[tuple[float, list[str]]]) -> list[list[str]]:
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def _nats(harm: float) -> str:
    return f"{harm:.2g}" if harm >= 1e-5 else "0"
