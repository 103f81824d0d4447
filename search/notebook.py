"""A search from Python: one call from a model and its data to a front that shows itself."""

import base64
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..compressors import ClassificationTask
from ..compressors.parity import feed
from ..compressors.task import NOTEBOOK, Dataset
from ..kernels import Session, make_runtime
from ..spaces import BadInput, nearest
from . import figures
from .choose import read_result
from .drawing import png
from .driver import search as run_search
from .exports import front_rows, trial_rows
from .live import LiveTask
from .progress import closing_sentence
from .reading import Run, read_run
from .report import write_report
from .run_files import PAGE
from .spec import Objective, Search, Spec, load_spec, make_spec
from .store import artifact_path, read_artifact
from .words import lost, speed

_SHOWN = ["mark", "speedup", "drop", "drop_test", "latency_ms", "size_bytes", "mean_kept_width"]


class GivenTask(ClassificationTask):
    """A task from its parts; what is not given is that of a classification."""

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        train: Dataset,
        val: Dataset,
        test: Dataset | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        metric: Callable[[Tensor, Tensor], float] | None = None,
    ) -> None:
        super().__init__(model, train, val, test)
        self._example, self._loss, self._metric = example_input, loss, metric

    def example_input(self) -> Any:
        return super().example_input() if self._example is None else self._example

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self._loss(output, target) if self._loss else super().loss(output, target)

    def metric(self, output: Tensor, target: Tensor) -> float:
        return self._metric(output, target) if self._metric else super().metric(output, target)


@dataclass(frozen=True)
class Model:
    """An artifact of a search. Calling it runs it as the target does, on this machine.

    path: the ONNX file. policy: what made it. figures: its row of ``Results.front``.
    """

    digest: str
    path: Path
    policy: Mapping[str, Any]
    figures: Mapping[str, Any]
    target: Mapping[str, Any]

    @cached_property
    def _session(self) -> Session:
        runtime = make_runtime(self.target["runtime"], self.target["threads"])
        return runtime.load(read_artifact(self.path.parents[2], self.digest))

    def __call__(self, inputs: Any) -> "np.ndarray[Any, Any]":
        """The answers, [N, ...], to a batch of inputs, [N, ...]: a tensor or an array, or a tuple
        or dict of them, as the task has it. Raises FlyweightError if the file is not what was
        scored, or if the runtime refuses the inputs."""
        return self._session.run(feed(_tensors(inputs)))


def _tensors(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: torch.as_tensor(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(torch.as_tensor(value) for value in inputs)
    return torch.as_tensor(inputs)


@dataclass(frozen=True)
class Results:
    """What a search came to, or has so far. It shows itself in a notebook.

    folder: the run directory. run: what it says. notes: what went wrong on the way.
    """

    folder: Path
    run: Run
    notes: tuple[str, ...] = ()

    @cached_property
    def front(self) -> pd.DataFrame:
        """A row an artifact, by ascending latency; latencies in ms, drops in points."""
        return pd.DataFrame(front_rows(self.run))

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row a trial: how far it came, what each rung found and took, why it ended."""
        return pd.DataFrame(trial_rows(self.run))

    @property
    def result(self) -> dict[str, Any]:
        """The content of result.json. Raises BadInput while the search runs."""
        return read_result(self.folder)

    @property
    def best(self) -> Model | None:
        """The best artifact; None while nothing keeps to the limits."""
        chosen = self.run.chosen
        return None if chosen is None or chosen.misses else self.model(chosen.figures.digest)

    @property
    def nearest_miss(self) -> Model | None:
        """Where nothing keeps to the limits, what comes nearest."""
        chosen = self.run.chosen
        return self.model(chosen.figures.digest) if chosen and chosen.misses else None

    def model(self, digest: str) -> Model:
        """The artifact of the front whose digest begins so. Raises BadInput."""
        rows = [row for row in front_rows(self.run) if row["digest"].startswith(digest)]
        if len(rows) != 1:
            known = ", ".join(row.figures.digest[:10] for row in self.run.front) or "none"
            raise BadInput(f"{digest!r} must begin one digest of the front; known: {known}")
        (row,) = rows
        path = self.folder / artifact_path(row["digest"])
        policy = json.loads(path.with_name("policy.json").read_text())
        return Model(row["digest"], path, policy, row, self.run.search["target"])

    @property
    def report(self) -> Path:
        """The report, written anew."""
        return write_report(self.folder)

    def __repr__(self) -> str:
        if self.run.result is not None:
            return closing_sentence(self.run.result)
        chosen = self.run.chosen
        if chosen is None:
            return "There is no artifact yet."
        return f"So far {speed(chosen.figures.speedup)}, {lost(chosen.drop)}, by predicted latency."

    def _repr_html_(self) -> str:
        said = html.escape(repr(self))
        if not self.run.front:
            return f"<p>{said}</p>"
        frame = self.front.set_index(self.front["digest"].str[:10])
        table = frame[_SHOWN].to_html(border=0, float_format="{:.4g}".format)
        drawn = png(figures.front_figure(self.run, ())[0], figures.WIDE)
        picture, page = base64.b64encode(drawn).decode(), self.folder / PAGE
        return (
            f'<p><b>{said}</b></p><img alt="Metric against speed-up; the table says the same" '
            f'width="640" src="data:image/png;base64,{picture}">{table}'
            + (f"<p>{html.escape(str(page))}</p>" if page.is_file() else "")
        )


def search(
    task: Any,
    example_input: Any = None,
    train: Dataset | None = None,
    val: Dataset | None = None,
    *,
    test: Dataset | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    metric: Callable[[Tensor, Tensor], float] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    address: str | None = None,
    **settings: Any,
) -> Results:
    """Runs a search, as ``flyweight search`` does, and returns what it came to.

    task: the path of a search.yaml; or a task, see ``flyweight.compressors.Task``; or a trained
    model with ``train`` and ``val`` (data sets of (input, target)) and perhaps ``test``.
    example_input: one request, batch 1 [without it: the first item of ``train``]. loss, metric: of
    (output, target), a higher metric being better [cross-entropy, accuracy in percent]. out,
    resume, address: as the options of ``flyweight search``. settings: the limits (``speedup``,
    ``latency_ms``, ``max_drop``, ``size_bytes``, ``compressed_bytes``) and what else search.yaml
    has: keys of its section ``search`` (``time_budget="4m"``), or whole sections
    (``target={"threads": 2}``).

    An interruption ends it with the best so far. Raises BadInput before anything is spent.
    """
    if isinstance(task, str | Path):
        given = {"example_input": example_input, "train": train, "val": val, "test": test,
                 "loss": loss, "metric": metric, **settings}  # fmt: skip
        if wrong := sorted(name for name, value in given.items() if value is not None):
            raise BadInput(
                f"{task} says what to search; beside it {', '.join(wrong)} means nothing"
            )
        spec = load_spec(Path(task))
    else:
        name = type(task).__name__
        if isinstance(task, nn.Module):
            if train is None or val is None:
                raise BadInput("a model needs train and val: data sets of (input, target)")
            task = GivenTask(task, example_input, train, val, test, loss, metric)
        spec = _spec(task, name, settings)
    outcome = run_search(spec, Path(out) if out else None, resume=resume, address=address)
    return Results(outcome.run_dir, read_run(outcome.run_dir), tuple(outcome.notes))


def load_run(folder: str | Path) -> Results:
    """What the search in the run directory ``folder`` came to, or has so far. Raises BadInput."""
    return Results(Path(folder), read_run(Path(folder)))


def _spec(task: Any, name: str, settings: Mapping[str, Any]) -> Spec:
    values: dict[str, Any] = {"task": f"{NOTEBOOK}:{name}", "objective": {}}
    sections = {key: "objective" for key in Objective.model_fields}
    sections |= {key: "search" for key in Search.model_fields}
    for key, value in settings.items():
        if section := sections.get(key):
            values[section] = values.get(section, {}) | {key: value}
        elif key in Spec.model_fields:
            values[key] = value
        else:
            known = [*sections, *Spec.model_fields]
            raise BadInput(f"search(): unknown {key!r}; {nearest(key, known)}")
    spec = make_spec(values, Path.cwd(), "search()")
    try:
        live = LiveTask.of(task)
    except Exception as error:  # whatever the user's objects raise
        what = f"{type(error).__name__}: {error}"
        raise BadInput(f"the task cannot be sent to workers, it does not pickle: {what}") from error
    return spec.with_task(live)
