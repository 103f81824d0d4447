"""The recorded benchmark: what policies of the joint space gave at every rung, one row a trial.

``benchmarks/joint/table.csv`` has a column for every parameter of the space of ``search.yaml``
beside it (empty where it does not act) and then what ``joint_record.py`` measured.
``teacher.json`` holds the teacher's own figures.
"""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flyweight.compressors import RUNGS, load_task
from flyweight.kernels import make_runtime
from flyweight.search.spec import Spec, load_spec
from flyweight.spaces import Policy, Space
from flyweight.spaces.tracing import trace

FOLDER = Path(__file__).resolve().parent / "joint"
TABLE = FOLDER / "table.csv"
TEACHER = FOLDER / "teacher.json"
FIGURES = ("loss", "metric", "seconds")  # of each rung


@dataclass(frozen=True)
class Row:
    """A trial that climbed all rungs, or as far as it came.

    source: how the policy was drawn. rungs: per rung ``loss`` (KL to the teacher on search
    validation), ``metric`` (there, at the full rung on selection validation) and ``seconds`` of
    the CPU, one thread. latency: of the artifact, the teacher's being 1. error: why it ended.
    """

    policy: Policy
    source: str
    seed: int
    rungs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latency: float = math.nan
    size_bytes: int = 0
    error: str = ""

    @property
    def whole(self) -> bool:
        return RUNGS[-1] in self.rungs and math.isfinite(self.latency)

    @property
    def kind(self) -> str:
        """What the policy does: "prune", "quantize", "both" or "neither"."""
        prunes, quantizes = bool(self.policy.prune.width), self.policy.quantize.acts
        if prunes and quantizes:
            return "both"
        return "prune" if prunes else "quantize" if quantizes else "neither"


@cache
def spec() -> Spec:
    return load_spec(FOLDER / "search.yaml")


@cache
def space() -> Space:
    """The space of the table; needs the network, but no data."""
    asked = spec()
    task = load_task(asked.task, asked.folder, asked.task_args)
    runtime = make_runtime(asked.target.runtime, asked.target.threads)
    network = trace(task.model().eval(), torch.zeros(1, 1, 28, 28))
    return Space(network, runtime.capabilities, asked.space.settings())


def columns(of: Space) -> list[str]:
    """The names of the table's columns, in order."""
    figures = [f"{rung} {figure}" for rung in RUNGS for figure in FIGURES]
    names = [p.name for p in of.parameters if len(p.choices) != 1]
    return ["source", "seed", *names, *figures, "latency", "size_bytes", "error"]


def cells(row: Row, of: Space) -> list[str]:
    """``row`` as the table has it."""
    values: dict[str, Any] = {"source": row.source, "seed": row.seed, "error": row.error}
    values |= of.values(row.policy)
    for rung, figures in row.rungs.items():
        values |= {f"{rung} {name}": f"{figures[name]:.6g}" for name in FIGURES}
    if row.whole:
        values |= {"latency": f"{row.latency:.4f}", "size_bytes": row.size_bytes}
    return [str(values.get(name, "")) for name in columns(of)]


def read(path: Path = TABLE) -> list[Row]:
    """The table, without a last line that was cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    with_end = text[: text.rfind("\n") + 1].splitlines()
    return [_row(cells_) for cells_ in csv.DictReader(with_end)]


def append(row: Row, path: Path = TABLE) -> None:
    """Adds ``row`` at the end of the table; what was cut off there goes."""
    new = not path.exists()
    if not new:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns(space()))
        writer.writerow(cells(row, space()))


def teacher() -> dict[str, Any]:
    """metric_search, metric_selection, latency_ms, size_bytes and where that was measured."""
    found: dict[str, Any] = json.loads(TEACHER.read_text())
    return found


def _row(given: Mapping[str, str]) -> Row:
    values = {
        p.name: _value(given[p.name], p.choices)
        for p in space().parameters
        if given.get(p.name, "") != ""
    }
    rungs = {
        rung: {name: float(given[f"{rung} {name}"]) for name in FIGURES}
        for rung in RUNGS
        if given[f"{rung} loss"]
    }
    return Row(
        space().policy(values), given["source"], int(given["seed"]), rungs,
        float(given["latency"] or "nan"), int(given["size_bytes"] or 0), given["error"],
    )  # fmt: skip


def _value(text: str, choices: tuple[Any, ...]) -> Any:
    if not choices:
        return float(text)
    return next(choice for choice in choices if str(choice) == text)


def by_policy(rows: list[Row]) -> Iterator[list[Row]]:
    """The trials of each policy, those of several seeds together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.policy.digest, []).append(row)
    yield from groups.values()
