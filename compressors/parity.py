"""Parity: does the runtime compute what the student computes? Asked of every artifact."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from ..kernels import Runtime, Session
from ..spaces import Impossible
from .data import Items, tensors
from .freeze import Rounding
from .outputs import CLASSES, OutputKind
from .prune import call, in_order

INPUTS = 2_000  # real inputs, or as many as there are
# Rounding flips grow through depth, so the largest deviation gates nothing: agreement of
# predictions and the mean deviation do.
AGREEMENT = {"fp32": 0.999, "int8": 0.995}
MEAN_STEPS = 1.0
# The relative error with which a runtime may compute what is then rounded. Float32 sums of a
# thousand products, in another order, with exp and erf approximated, were off by up to 2e-6.
NOISE = 1e-5
CHANCE = 2.0  # standard errors by which two networks that are equally disturbed may differ
DEPARTED = 1e-3  # share of a value's elements that are off by more than a rounding flip


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
    parts = [session.run(feed(batch.inputs)) for batch in items.chunks()]
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
    return torch.cat([call(module, batch.inputs) for batch in items.chunks()])


def compare(student: Tensor, runtime: Tensor, kind: OutputKind = CLASSES) -> Parity:
    """How far ``runtime`` departs from ``student``; both [N, ...] and of ``kind``."""
    same, deviation = _by_item(student, runtime, kind)
    return Parity(same.mean().item(), deviation.mean().item(), deviation.max().item(), len(student))


def _by_item(student: Tensor, runtime: Tensor, kind: OutputKind) -> tuple[Tensor, Tensor]:
    """[N, predictions an item] 1 where they are equal; [N, numbers an item] deviation in steps."""
    step = max((student.max() - student.min()).item(), 1e-12) / 255
    same = kind.same(student, runtime, step).double()
    deviation = (student - runtime).abs() / step
    return same.reshape(len(same), -1), deviation.reshape(len(deviation), -1)


def check_parity(
    frozen: fx.GraphModule,
    model: bytes,
    answers: Tensor,
    items: Items,
    precision: str,
    runtime: Runtime,
    kind: OutputKind = CLASSES,
) -> Parity:
    """Compares the answers of ``model`` in ``runtime`` to ``items`` with those of ``frozen``.

    They may differ as ``AGREEMENT[precision]`` and ``MEAN_STEPS`` allow, and by as much as
    ``frozen`` differs from itself under ``NOISE`` (a runtime that rounds otherwise than
    ``frozen`` does: one flip can change a deep network's answer), give or take ``CHANCE``.
    Raises Impossible, naming the first value at which the runtime departs, if it is more.
    """
    count = min(INPUTS, len(items))
    some = items.first(count)
    own = run_module(frozen, some)
    found = compare(own, answers[:count], kind)
    # On few inputs one rounding flip must not fail a candidate.
    allowed = min(AGREEMENT[precision], 1 - 1.5 / count)
    if found.agreement >= allowed and found.mean_steps <= MEAN_STEPS:
        return found
    same, deviation = (x.double().mean(1) for x in _by_item(own, _run_noisy(frozen, some), kind))
    allowed = min(allowed, (same.mean() - _chance(same)).item())
    steps = max(MEAN_STEPS, (deviation.mean() + _chance(deviation)).item())
    if found.agreement >= allowed and found.mean_steps <= steps:
        return found
    raise Impossible(
        f"parity: the runtime agrees with the student on {found.agreement:.2%} of {count} inputs "
        f"(at least {allowed:.2%} needed), mean deviation {found.mean_steps:.2f} steps (at most "
        f"{steps:.3g}), largest {found.max_steps:.1f}; it departs first at "
        f"{first_departure(frozen, model, next(some.chunks()), runtime)}"
    )


def _chance(items: Tensor) -> Tensor:
    """By how much the means of two draws of ``items`` [N] may differ."""
    return CHANCE * items.std(correction=0) * math.sqrt(2 / len(items))


def _run_noisy(frozen: fx.GraphModule, items: Items) -> Tensor:
    """The answers of ``frozen`` when everything that it rounds is off by ``NOISE``, [N, ...]."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_: torch.nn.Module, inputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        steps, zero = inputs
        noise = NOISE * torch.randn(steps.shape, generator=generator)
        return steps + (steps - zero) * noise, zero

    with ExitStack() as hooks:
        for module in frozen.modules():
            if isinstance(module, Rounding):
                hooks.enter_context(module.register_forward_pre_hook(disturb))
        return run_module(frozen, items)


def first_departure(frozen: fx.GraphModule, model: bytes, items: Items, runtime: Runtime) -> str:
    """The first value of ``frozen`` that ``model`` computes otherwise in ``runtime``.

    Where anything is quantized, only quantized values are looked at: one between would be a
    different kernel once somebody reads it.
    """
    written = onnx.load_from_string(model)
    known = {name: name for node in written.graph.node for name in node.output}
    for node in written.graph.node:  # one for each reader, where there is none for all
        if node.op_type == "DequantizeLinear":
            known.setdefault(node.input[0].removesuffix(":integers"), node.output[0])
    nodes = [n for n in frozen.graph.nodes if n.name in known]
    quantized = [n for n in nodes if str(n.target).startswith("quantizer_")]
    places = {n: n.args[0].name if quantized else n.name for n in quantized or nodes}
    values = _values(frozen, list(places), items)
    for node, name in places.items():
        del written.graph.output[:]
        written.graph.output.append(onnx.ValueInfoProto(name=known[node.name]))
        answers = run_session(runtime.load(written.SerializeToString()), items)
        step = max((values[node].max() - values[node].min()).item(), 1e-12) / 255
        off = (answers - values[node]).abs() > 1.5 * step
        if off.double().mean() > DEPARTED:
            return f"value {name!r}"
    return "the output"


def _values(graph: fx.GraphModule, nodes: list[fx.Node], items: Items) -> dict[fx.Node, Tensor]:
    """What ``nodes`` of ``graph`` compute for ``items``, [N, ...] each."""
    seen: dict[fx.Node, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in nodes:
                seen[n] = result
            return result

    with torch.no_grad():
        Watch(graph).run(*in_order(graph, items.inputs))
    return seen
