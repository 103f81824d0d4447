"""Whether ONNX Runtime executes the kernels that a blueprint says: random policies of each network.

    python benchmarks/kernels.py [--network resnet ...] [--policies 200]

Policies as a profile draws them (as many fp32 and int8 as mixed, random widths) are built untrained
and loaded; the graph that the runtime made of each is compared, as a multiset, with what the rules
of rewritten.py say of its blueprint: layers (operation, precision, weights, stride, groups, fused
activation and add) with what runs between them, and boundaries (quantize, dequantize, transpose,
reorder). What rules do not look at, such as the norms of a transformer, has to be what it is in the
network as it is. The graph says no sizes of values, and of an integer layer no activation. The
machine writes benchmarks/out/kernels-NETWORK.json; the blocks of channels are this machine's.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import write
from executed import optimized_graph
from rewritten import BOUNDARIES, block, executed, rewritten
from torch import nn

from flyweight.compressors import ClassificationTask, Prepared, untrained
from flyweight.compressors.data import tree_map
from flyweight.search.profiling import mixed_policies
from flyweight.search.ready import make_space, prepare_task
from flyweight.search.spec import Spec
from flyweight.spaces import Impossible, Policy

HERE = Path(__file__).resolve()
EXAMPLES = HERE.parents[1] / "examples"
ITEMS, SEED, SHOWN = 16, 2026, 5


def _made(folder: str, module: str, name: str, *arguments: Any) -> nn.Module:
    if str(EXAMPLES / folder) not in sys.path:
        sys.path.insert(0, str(EXAMPLES / folder))
    network: nn.Module = getattr(import_module(module), name)(*arguments)
    return network


def _minilm() -> nn.Module:
    return _made(
        "rotten_tomatoes", "minilm", "Classifier", _made("rotten_tomatoes", "minilm", "MiniLM")
    )


def _words() -> dict[str, torch.Tensor]:
    mask = (torch.arange(64) < 40).long().expand(ITEMS, -1)
    return {"input_ids": torch.randint(30_522, (ITEMS, 64)), "attention_mask": mask}


# The network and its inputs. Weights are random and inputs noise: no kernel depends on them.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet": (
        lambda: _made("fashion_mnist", "resnet", "ResNet"), lambda: torch.rand(ITEMS, 1, 28, 28)
    ),
    "har": (lambda: _made("har", "network", "SignalNet"), lambda: torch.randn(ITEMS, 6, 128)),
    "article_cnn": (
        lambda: _made("article_cnn", "article", "ArticleCnn"),
        lambda: torch.randn(ITEMS, 3, 32, 32),
    ),
    "vit": (lambda: _made("fashion_mnist", "vit", "ViT"), lambda: torch.rand(ITEMS, 1, 28, 28)),
    "minilm": (_minilm, _words),
    "mobilenet_v2": (
        lambda: _made("imagenet", "mobilenet_v2", "MobileNetV2"),
        lambda: torch.randn(ITEMS, 3, 224, 224),
    ),
    "efficientnet_lite0": (
        lambda: _made("imagenet", "efficientnet_lite0", "EfficientNetLite0"),
        lambda: torch.randn(ITEMS, 3, 224, 224),
    ),
}  # fmt: skip


class Untrained(ClassificationTask):
    """One of ``NETWORKS``."""

    def __init__(self, network: str) -> None:
        torch.manual_seed(0)
        make, inputs = NETWORKS[network]
        self._model, values = make().eval(), inputs()
        items = [(tree_map(lambda t, i=i: t[i], values), i % 2) for i in range(ITEMS)]
        self.train, self.val = items[::2], items[1::2]

    def model(self) -> nn.Module:
        return self._model


def spec_of(network: str) -> Spec:
    return Spec.model_validate(
        {
            "task": f"{HERE}:Untrained", "task_args": {"network": network},
            "objective": {"speedup": 1.0}, "space": {"prune": {"min_keep": 0.125}},
        }
    )  # fmt: skip


class Rules:
    """What the rules say of policies of one network.

    rest: how many more of a kernel run in the network as it is; not by policy, so in all of them.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._block = prepared, block()
        said, ran = self.of(Policy())
        more = {kind: ran[kind] - said[kind] for kind in {*said, *ran} if " " not in kind}
        self.rest = {kind: count for kind, count in more.items() if count}

    def of(self, policy: Policy) -> tuple[Counter[str], Counter[str]]:
        """The kernels that are said to run, and those that do. Raises Impossible."""
        said = rewritten(self._prepared.plan(policy), self._block)
        return said, executed(optimized_graph(untrained(self._prepared, policy)))

    def missed(self, policy: Policy) -> dict[str, int]:
        """How many more of a kernel run than are said to, where it is not as many."""
        said, ran = self.of(policy)
        kinds = {*said, *ran, *self.rest}
        more = {kind: ran[kind] - said[kind] - self.rest.get(kind, 0) for kind in kinds}
        return {kind: count for kind, count in more.items() if count}


def measure(network: str, policies: int) -> dict[str, Any]:
    """Shares of ``policies`` of which all layers, all boundaries, and both are as said."""
    spec = spec_of(network)
    prepared = prepare_task(spec)
    rules = Rules(prepared)
    equal, differences, impossible = Counter(), Counter(), 0
    first: dict[str, Any] | None = None
    for policy in islice(mixed_policies(make_space(prepared, spec), SEED), policies):
        try:
            missed = rules.missed(policy)
        except Impossible:
            impossible += 1
            continue
        boundaries = BOUNDARIES.intersection(missed)
        equal["layers"] += boundaries == missed.keys()
        equal["boundaries"] += not boundaries
        equal["both"] += not missed
        differences.update(f"{kind} {count:+d}" for kind, count in missed.items())
        if missed and first is None:
            first = {"policy": policy.canonical(), "missed": missed}
    built = policies - impossible
    return {
        "network": network, "policies": built, "impossible": impossible,
        **{part: equal[part] / max(built, 1) for part in ("layers", "boundaries", "both")},
        "differences": dict(differences.most_common(SHOWN)), "first": first, "rest": rules.rest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--policies", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'network':20s}{'policies':>10s}{'layers':>10s}{'boundaries':>12s}{'both':>10s}")
    for network in given.network:
        found = measure(network, given.policies)
        print(
            f"{network:20s}{found['policies']:10d}{found['layers']:10.1%}"
            f"{found['boundaries']:12.1%}{found['both']:10.1%}  {found['differences'] or ''}",
            flush=True,
        )
        write(f"kernels-{network}", found)


if __name__ == "__main__":
    main()
