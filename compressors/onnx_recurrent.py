"""What recurrent modules are in ONNX: ``RECURRENT``, by module type."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from .onnx_file import NotCovered, Operation, Writer

# Places of ONNX's gates among PyTorch's: (i, f, g, o) to i, o, f, c; (r, z, n) to z, r, h.
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _recurrent(kind: str) -> Operation:
    """All layers of a module, one after the other."""

    def write_recurrent(w: Writer, node: fx.Node, result: Any) -> None:
        module, name = w.owner(node), w.names[node]
        (given,) = w.arguments(node, hx=None)
        if result[0].ndim != 3 or getattr(module, "proj_size", 0):
            raise NotCovered
        first = module.batch_first
        if not w.varies(node.args[0], 0 if first else 1):
            raise NotCovered  # one sequence for all requests
        x = w.value(node)
        if first:
            x = w.node("Transpose", [x], f"{name}:steps", perm=[1, 0, 2])
        directions = 2 if module.bidirectional else 1
        own = _settings(module, kind, directions)
        if module.bidirectional:
            own["direction"] = "bidirectional"
        begins = [] if given is None else _begins(w, given)
        states: dict[str, list[str]] = {"h": [], "c": []}
        for layer in range(module.num_layers):
            out = f"{name}:{layer}"
            ends = [f"_l{layer}", f"_l{layer}_reverse"][:directions]
            inputs = [x, *_weights(w, node, module, ends, kind)]
            if begins:
                inputs += [""] * (5 - len(inputs))  # no bias, and never lengths
            for state, value in zip("hc", begins, strict=False):
                rows = [w.numbers([n * directions]) for n in (layer, layer + 1)]
                begin = f"{out}:{state}0"
                inputs.append(w.node("Slice", [value, *rows, w.numbers([0])], begin))
            made = [out, f"{out}:h", *([f"{out}:c"] if kind == "LSTM" else [])]
            w.several(kind, inputs, made, **own)
            for state, value in zip("hc", made[1:], strict=False):
                states[state].append(value)
            last = layer == module.num_layers - 1
            # [steps, directions, N, hidden], directions side by side
            order = [2, 0, 1, 3] if first and last else [0, 2, 1, 3]
            x = w.node("Transpose", [out], f"{out}:turned", perm=order)
            width = w.numbers([0, 0, directions * module.hidden_size])
            x = w.node("Reshape", [x, width], f"{out}:joined")
        left = [
            values[0] if len(values) == 1 else w.node("Concat", values, f"{name}:{state}", axis=0)
            for state, values in states.items()
            if values
        ]
        found: list[Any] = [x, left if kind == "LSTM" else left[0]]
        w.parts[node] = found

    return write_recurrent


def _cell(kind: str) -> Operation:
    """One step, as a sequence of one."""

    def write_cell(w: Writer, node: fx.Node, _: Any) -> None:
        module, name = w.owner(node), w.names[node]
        (given,) = w.arguments(node, hx=None)
        made = ["h", "c"] if kind == "LSTM" else ["h"]
        if len(w.shape(node)) != 2:
            raise NotCovered
        first = w.numbers([0])
        inputs = [w.node("Unsqueeze", [w.value(node), first], f"{name}:step")]
        inputs += _weights(w, node, module, [""], kind)
        if given is not None:
            inputs += [""] * (5 - len(inputs))
            for state, value in zip(made, _begins(w, given), strict=True):
                inputs.append(w.node("Unsqueeze", [value, first], f"{name}:{state}0"))
        steps = [f"{name}:{state}1" for state in made]
        w.several(kind, inputs, [f"{name}:all", *steps], **_settings(module, kind, 1))
        if kind != "LSTM":
            w.node("Squeeze", [*steps, first], name)
            return
        w.parts[node] = [
            w.node("Squeeze", [step, first], f"{name}:{state}")
            for step, state in zip(steps, made, strict=True)
        ]

    return write_cell


def _settings(module: Any, kind: str, directions: int) -> dict[str, Any]:
    own: dict[str, Any] = {"hidden_size": module.hidden_size}
    if kind == "GRU":
        own["linear_before_reset"] = 1
    if kind == "RNN":
        own["activations"] = [module.nonlinearity.capitalize()] * directions
    return own


def _begins(w: Writer, given: Any) -> list[str]:
    """The first states: h, or (h, c), also as another module leaves them."""
    if not isinstance(given, fx.Node):
        return [w.read(state) for state in given]
    return w.parts[given] if given in w.parts else [w.read(given)]


def _weights(w: Writer, node: fx.Node, module: Any, ends: list[str], kind: str) -> list[str]:
    """W, R and B of a layer: [directions, gates * hidden, ...], B those of both side by side. ends:
    of the names of its tensors, one for each direction."""

    def gates(tensor: Tensor) -> Tensor:
        parts = tensor.chunk(len(GATES[kind]))
        return torch.cat([parts[i] for i in GATES[kind]])

    def stacked(*names: str) -> Tensor:
        rows = [torch.cat([gates(getattr(module, n + end)) for n in names]) for end in ends]
        return torch.stack(rows)

    found = [
        w.constant(f"{node.target}.weight_{part}{ends[0]}", stacked(f"weight_{part}"))
        for part in ("ih", "hh")
    ]
    if module.bias:
        both = stacked("bias_ih", "bias_hh")
        found.append(w.constant(f"{node.target}.bias{ends[0]}", both))
    return found


RECURRENT: dict[Any, Operation] = {
    nn.LSTM: _recurrent("LSTM"),
    nn.GRU: _recurrent("GRU"),
    nn.RNN: _recurrent("RNN"),
    nn.LSTMCell: _cell("LSTM"),
    nn.GRUCell: _cell("GRU"),
    nn.RNNCell: _cell("RNN"),
}
