"""Correction: each int8 layer is fitted, in execution order, to what it computed in float.

A layer whose float self computed W' x' + b' gets rounded inputs x. Its weights are first solved
for them by least squares, with a pull to where they were (He et al. 2017, eq. 3, on rounded inputs),

    W = (W' cov(x', x) + r W') (cov(x) + r I)^-1,

then rounded one input after the other, each time moving what is not yet rounded so that the output
stays where it was (Frantar et al. 2023, "GPTQ", alg. 1; the least squares step of Hassibi and
Stork 1993). The bias takes what is left of the mean error (Nagel et al. 2019, sec. 4.2).
"""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..spaces import Blueprint, Network
from .data import Items
from .observe import weight_scale
from .prune import in_order
from .quantize import ActivationQuantizer, QuantizedLayer, apply_layer, quantizer_name

ROWS = 4_096  # output positions that the covariances of a layer are taken from, at least
SHRINK = 4.0
REFIT = False
RIDGE = 1e-2  # r, as a share of the mean variance of the layer's inputs


@torch.no_grad()
def correct_(
    graph: fx.GraphModule, network: Network, plan: Blueprint, items: Items, calibration: str
) -> None:
    """Fits the int8 layers of the calibrated ``graph`` to their float selves, in place."""
    graph.eval()
    floats: dict[fx.Node, Any] = {}
    rounded: dict[fx.Node, Any] = {}
    sources = {
        name: quantizer_name(plan.quantized[network.op[layer.op].inputs[0]])
        for name, layer in network.layers.items()
        if plan.precision[name] == "int8"
    }
    inputs = iter(in_order(graph, items.inputs))
    last = _last_uses(graph)
    for node in graph.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            floats[node] = rounded[node] = next(inputs)
            continue
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        ours, theirs = (
            fx.node.map_arg((node.args, node.kwargs), lambda n, e=env: e[n])
            for env in (rounded, floats)
        )
        if isinstance(module, ActivationQuantizer):
            rounded[node], floats[node] = module(ours[0][0]), theirs[0][0]
        elif isinstance(module, QuantizedLayer):
            layer = module.layer
            floats[node] = layer(theirs[0][0])
            source: Any = graph.get_submodule(sources[str(node.target)])
            fit_(module, ours[0][0], theirs[0][0], floats[node], source.scale, calibration)
            rounded[node] = module(ours[0][0])
        else:
            same = all(rounded[n] is floats[n] for n in node.all_input_nodes)
            floats[node] = _run(graph, node, module, theirs)
            rounded[node] = floats[node] if same else _run(graph, node, module, ours)
        for gone in last.get(node, ()):
            del floats[gone], rounded[gone]


def _run(graph: fx.GraphModule, node: fx.Node, module: Any, given: Any) -> Any:
    args, kwargs = given
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "get_attr":
        value: Any = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _last_uses(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        for read in node.all_input_nodes:
            last[read] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last.items():
        out.setdefault(node, []).append(read)
    return out


def fit_(
    quantized: QuantizedLayer,
    x: Tensor,
    x_float: Tensor,
    y_float: Tensor,
    input_scale: Tensor,
    calibration: str,
) -> None:
    """Weights, scales and bias of one layer from its rounded inputs ``x``, its inputs in float
    and what it answered to these, in place."""
    layer = quantized.layer
    groups = getattr(layer, "groups", 1)
    shape = layer.weight.shape
    weight = layer.weight.reshape(groups, shape[0] // groups, -1).double()  # [G, O, F]
    if (some := sampled_rows(layer, x, x_float)) is not None:
        rows, rows_float = some
        mean, mean_float = rows.mean(1, keepdim=True), rows_float.mean(1, keepdim=True)
        a, b = rows - mean, rows_float - mean_float
        covariance = (a.mT @ a / a.shape[1]).double()  # [G, F, F]
        cross = (b.mT @ a / a.shape[1]).double()
        variance = covariance.diagonal(dim1=1, dim2=2)  # [G, F]
        ridge = (RIDGE * variance.mean(1)).clamp_min(1e-12)[:, None, None]
        shrink = SHRINK * covariance.shape[-1] / a.shape[1]
        eye = torch.eye(covariance.shape[-1], dtype=torch.float64)
        keep = 1 / (1 + shrink)
        h = (keep + (1 - keep) * eye) * covariance + ridge * eye
        if REFIT:
            weight = weight + torch.linalg.solve(h, keep * (cross - covariance).mT @ weight.mT).mT
        layer.weight.copy_(weight.reshape(shape))
        quantized.scale.copy_(weight_scale(layer.weight, quantized.limit, calibration))
        if layer.bias is not None:
            quantized.settle_bias(input_scale)
        step = quantized.scale.double().reshape(groups, -1, 1)
        weight = rounded_in_turn(weight, h, step, quantized.limit)
        layer.weight.copy_(weight.reshape(shape))
    error = y_float - apply_layer(layer, x, quantized.rounded_weight(), layer.bias)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(shape[0]))
    layer.bias += error.mean(_all_but(layer, error))
    quantized.settle_bias(input_scale)


def _all_but(layer: Any, y: Tensor) -> list[int]:
    axis = y.ndim - 1 if isinstance(layer, nn.Linear) else 1
    return [i for i in range(y.ndim) if i != axis]


def rounded_in_turn(weight: Tensor, h: Tensor, step: Tensor, limit: int) -> Tensor:
    """``weight`` [G, O, F] rounded to multiples of ``step`` [G, O, 1], F by F, for inputs of
    second moments ``h`` [G, F, F]."""
    order = h.diagonal(dim1=1, dim2=2).argsort(1, descending=True)  # loud inputs cannot wait
    back = order.argsort(1)
    size = h.shape[-1]
    w = weight.gather(2, order[:, None].expand_as(weight))
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)  # [G, F, F]
    for i in range(size):
        whole = (w[:, :, i : i + 1] / step).round().clamp(-limit, limit) * step
        error = (w[:, :, i : i + 1] - whole) / upper[:, i, i][:, None, None]
        w[:, :, i + 1 :] -= error * upper[:, i : i + 1, i + 1 :]
        w[:, :, i : i + 1] = whole
    return w.gather(2, back[:, None].expand_as(w))


def sampled_rows(layer: Any, *inputs: Tensor) -> tuple[Tensor, ...] | None:
    """What meets the weights at some output positions, for each of ``inputs`` [G, rows, F]."""
    if isinstance(layer, nn.Linear):
        return tuple(_thin(x.flatten(0, -2))[None] for x in inputs)
    if isinstance(layer, nn.Conv3d) or isinstance(layer.padding, str):
        return None
    out = []
    for x in inputs:
        where = {n: getattr(layer, n) for n in ("kernel_size", "dilation", "padding", "stride")}
        if isinstance(layer, nn.Conv1d):
            x = x[:, :, None]
            where = {n: (0 if n == "padding" else 1, *v) for n, v in where.items()}
        positions = math.prod(x.shape[2:]) // math.prod(where["stride"])
        images = min(len(x), max(16, math.ceil(ROWS / positions)))
        x = x[torch.linspace(0, len(x) - 1, images).long()]
        if math.prod(where["kernel_size"]) == 1 and not any(where["padding"]):
            columns = x[:, :, :: where["stride"][0], :: where["stride"][1]].flatten(2)
        else:
            columns = F.unfold(x, **where)  # [N, C F, positions]
        rows = _thin(columns.transpose(1, 2).flatten(0, 1))
        out.append(rows.reshape(len(rows), layer.groups, -1).transpose(0, 1))
    return tuple(out)


def _thin(rows: Tensor) -> Tensor:
    """At most ``ROWS`` of the rows (or four for each of their elements), evenly."""
    most = max(ROWS, 4 * rows.shape[1])
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).long()]
