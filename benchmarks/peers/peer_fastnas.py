"""ModelOpt's FastNAS pruning, distillation, static int8 by ONNX Runtime's quantizer.

As ModelOpt's guide to pruning says: the score is accuracy on validation, the sensitivity of every
layer is measured once and kept (its checkpoint), subnets for several shares of the FLOPs are taken
from it, timed before training, and the largest that keeps the limit is fine-tuned. Widths are
multiples of 8 (``channel_divisor``; the default of 32 leaves this network next to no choice).
"""

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp
import torch
from shared import Bench, Order, main
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flyweight.compressors.parity import run_module
from flyweight.spaces import Impossible

SHARES = [percent / 100 for percent in range(100, 0, -2)]  # of the teacher's FLOPs
SCORED = 1_000  # images of search validation
BATCH, BATCHES = 128, 50  # that recalibrate norms, as ModelOpt takes them from the loader

FOLDER = Path(tempfile.mkdtemp(prefix="flyweight-fastnas-"))


@cache
def pruned(bench: Bench, share: float) -> nn.Module:
    """What FastNAS finds for ``share`` of the FLOPs; its first call measures sensitivities. Raises
    Impossible where it finds nothing."""
    if share == 1:
        return bench.teacher()
    some = bench.prepared.splits.search.first(SCORED)
    train = bench.prepared.splits.train.first(BATCH * BATCHES)
    config = mtp.fastnas.FastNASConfig()
    for kind, divisor in (("nn.Conv2d", "channel_divisor"), ("nn.BatchNorm2d", "feature_divisor")):
        config[kind]["*"][divisor] = 8
    config["nn.Linear"]["*"]["feature_divisor"] = 8

    def score(model: nn.Module) -> float:
        return bench.task.metric(run_module(model.eval(), some), some.targets)

    try:
        model, _ = mtp.prune(
            model=bench.teacher(), mode=[("fastnas", config)],
            constraints={"flops": f"{100 * share:g}%"}, dummy_input=torch.zeros(1, 1, 28, 28),
            config={
                "data_loader": DataLoader(TensorDataset(train.inputs, train.targets), BATCH),
                "score_func": score,
                "checkpoint": str(FOLDER / "search.pth"),
            },
        )  # fmt: skip
    except (KeyError, ValueError) as error:  # no configuration keeps the share
        raise Impossible(f"FastNAS finds nothing with {100 * share:g}% of the FLOPs") from error
    return model


def build(order: Order) -> tuple[bytes, dict[str, Any]]:
    bench = order.bench
    share, precision = bench.widest(SHARES, lambda share: pruned(bench, share), order.limit)
    made = bench.finish(copy.deepcopy(pruned(bench, share)), precision, order.account)
    return made.model, {"flops": share, **made.how}


if __name__ == "__main__":
    main("fastnas", build)
