"""Modules that nothing has a rule for, as the plain ones that compute the same."""

from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from ..spaces.operations import shape_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def make_plainer_(graph: fx.GraphModule) -> bool:
    """Makes batch norms of those that are synchronised over processes, and lets convolutions that
    pad with more than zeros, as no int8 kernel does, read what was padded; whether there were any.
    """
    found = False
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        module: Any = graph.get_submodule(name)
        if isinstance(module, nn.SyncBatchNorm):
            plain: nn.Module = _norm(module, len(shape_of(nodes[0])))
        elif type(module) in CONVOLUTIONS and module.padding_mode != "zeros":
            plain = _convolution(module)
            for node in nodes:
                _pad(graph, node, module)
        else:
            continue
        plain.load_state_dict(module.state_dict())
        graph.set_submodule(name, plain.eval())
        found = True
    return found


def _norm(given: nn.SyncBatchNorm, rank: int) -> nn.Module:
    return NORMS[rank](
        given.num_features, given.eps, given.momentum, given.affine, given.track_running_stats
    )


def _convolution(given: Any) -> nn.Module:
    made: nn.Module = type(given)(
        given.in_channels, given.out_channels, given.kernel_size, given.stride, 0, given.dilation,
        given.groups, given.bias is not None,
    )  # fmt: skip
    return made


def _pad(graph: fx.GraphModule, node: fx.Node, module: Any) -> None:
    """Puts before ``node`` the padding of ``module``, which it calls."""
    amounts = tuple(module._reversed_padding_repeated_twice)  # as F.pad takes them
    with graph.graph.inserting_before(node):
        padded = graph.graph.call_function(F.pad, (node.args[0], amounts, module.padding_mode))
    node.args = (padded, *node.args[1:])
