"""Parity: does the runtime compute what the student computes? Asked of every artifact."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..kernels import Session
from ..spaces import Impossible
from .data import Items, tensors, tree_map
from .export import to_onnx
from .prune import call

INPUTS = 2_000  # real inputs, or as many as there are
BATCH = 100
# Rounding flips grow through depth, so the largest deviation gates nothing: agreement of
# predictions and the mean deviation do.
AGREEMENT = {"fp32": 0.999, "int8": 0.995}
MEAN_STEPS = 1.0


@dataclass(frozen=True)
class Parity:
    """agreement: share of equal predictions. mean_steps, max_steps: deviation of the outputs, in
    steps of 1/255 of their range. inputs: how many were compared."""

    agreement: float
    mean_steps: float
    max_steps: float
    inputs: int


def run_session(session: Session, items: Items) -> Tensor:
    """The answers of a runtime's session to ``items``, [N, ...]."""
    parts = [session.run(feed(batch.inputs)) for batch in items.batches(BATCH)]
    return torch.from_numpy(np.concatenate(parts))


def feed(inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A batch of inputs under the names an artifact gives them."""
    if isinstance(inputs, dict):
        return {name: value.numpy() for name, value in inputs.items()}
    if isinstance(inputs, tuple) and len(inputs) > 1:
        return {f"input_{i}": value.numpy() for i, value in enumerate(inputs)}
    return {"input": tensors(inputs)[0].numpy()}


@torch.no_grad()
def run_module(module: torch.nn.Module, items: Items) -> Tensor:
    """The answers of ``module`` to ``items``, [N, ...]."""
    module.eval()
    return torch.cat([call(module, batch.inputs) for batch in items.batches(BATCH)])


def compare(student: Tensor, runtime: Tensor) -> Parity:
    """How far ``runtime`` departs from ``student``; both [N, ...]."""
    step = max((student.max() - student.min()).item(), 1e-12) / 255
    deviation = (student - runtime).abs() / step
    if student.ndim > 1 and student.shape[-1] > 1:
        same = student.argmax(-1) == runtime.argmax(-1)
    else:
        same = deviation <= 1
    return Parity(
        same.double().mean().item(), deviation.mean().item(), deviation.max().item(), len(student)
    )


def check_parity(
    frozen: fx.GraphModule,
    answers: Tensor,
    items: Items,
    precision: str,
    load: Callable[[bytes], Session],
) -> Parity:
    """Compares the runtime's ``answers`` to ``items`` with those of ``frozen``.

    Raises Impossible, naming the first value at which the runtime departs, if they differ by more
    than ``AGREEMENT[precision]`` and ``MEAN_STEPS`` allow.
    """
    count = min(INPUTS, len(items))
    some = items.take(torch.arange(count))
    found = compare(run_module(frozen, some), answers[:count])
    # On few inputs one rounding flip must not fail a candidate.
    allowed = min(AGREEMENT[precision], 1 - 1.5 / count)
    if found.agreement >= allowed and found.mean_steps <= MEAN_STEPS:
        return found
    raise Impossible(
        f"parity: the runtime agrees with the student on {found.agreement:.2%} of {count} inputs "
        f"(at least {allowed:.2%} needed), mean deviation {found.mean_steps:.2f} steps (at most "
        f"{MEAN_STEPS:g}), largest {found.max_steps:.1f}; it departs first at "
        f"{first_departure(frozen, some.take(torch.arange(min(count, 200))), load)}"
    )


def first_departure(
    frozen: fx.GraphModule, items: Items, load: Callable[[bytes], Session]
) -> str:
    """The first quantized value (or the output) on which runtime and student differ by a step."""
    nodes = list(frozen.graph.nodes)
    output = nodes[-1]
    places = [n for n in nodes if n.op == "call_module" and str(n.target).startswith("quantizer_")]
    places.append(output.args[0])
    example = tree_map(lambda t: t[:1], items.inputs)

    def departs(node: fx.Node) -> bool:
        graph = fx.Graph()
        graph.output(graph.graph_copy(frozen.graph, values := {}) and values[node])
        part = fx.GraphModule(frozen, graph)
        graph.eliminate_dead_code()
        part.recompile()
        answers = run_session(load(to_onnx(part, example)), items)
        return compare(run_module(part, items), answers).mean_steps > MEAN_STEPS

    low, high = 0, len(places) - 1
    while low < high:  # deviations grow with depth, so halving finds where they begin
        middle = (low + high) // 2
        low, high = (low, middle) if departs(places[middle]) else (middle + 1, high)
    place = places[low]
    return "the output" if low == len(places) - 1 else f"value {place.args[0].name!r}"
