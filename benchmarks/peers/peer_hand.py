"""The recipe by hand: uniform pruning, distillation, static int8 by ONNX Runtime's quantizer.

The share of channels is the largest whose untrained network keeps the limit. Groups are pruned by
torch-pruning as its README shows: uniformly, by the magnitude of a group (Fang et al. 2023,
"DepGraph"), in multiples of 8.
"""

from typing import Any

import torch_pruning as tp
from shared import Order, main
from torch import nn

# Of the channels. Of less than a quarter of 32 no 8 would be left, and torch-pruning leaves such a
# group as it is: slower again.
SHARES = [sixteenths / 16 for sixteenths in range(16, 3, -1)]


def build(order: Order) -> tuple[bytes, dict[str, Any]]:
    bench = order.bench

    def pruned(share: float) -> nn.Module:
        model = bench.teacher()
        if share < 1:
            pruner = tp.pruner.BasePruner(
                model, bench.prepared.example, tp.importance.GroupMagnitudeImportance(),
                pruning_ratio=1 - share, ignored_layers=[model.head], round_to=8,
            )  # fmt: skip
            pruner.step()
        return model

    share, precision = bench.widest(SHARES, pruned, order.limit)
    made = bench.finish(pruned(share), precision, order.account)
    order.student.write_bytes(made.fp32)
    return made.model, {"kept": share, **made.how}


if __name__ == "__main__":
    main("hand", build)
