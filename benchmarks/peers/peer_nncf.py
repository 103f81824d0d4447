"""NNCF's post-training int8 (no training with quantizers) on the students of ``hand``.

NNCF 3 has no pruning of channels left (``nncf.prune`` zeroes single weights), so the student is the
recipe's. Both presets of its documentation are tried, the nearest to the teacher on search
validation counts. Its slow bias correction (``fast_bias_correction=False``) ends on this network
with an error of ONNX Runtime: a part of the network that NNCF cut out names an output it lacks.
"""

from typing import Any

import nncf
import onnx
from shared import Order, main


def build(order: Order) -> tuple[bytes, dict[str, Any]]:
    items = order.bench.calibration
    requests = nncf.Dataset([{"input": batch.inputs.numpy()} for batch in items.batches(1)])
    fp32, made = onnx.load(order.student), {}
    for preset in nncf.QuantizationPreset:
        model = nncf.quantize(
            fp32, requests, subset_size=len(items), preset=preset,
            target_device=nncf.TargetDevice.CPU,
        )  # fmt: skip
        made[preset.value] = model.SerializeToString()
    scores = {name: order.bench.scores(model)["loss"] for name, model in made.items()}
    best = min(scores, key=scores.__getitem__)
    return made[best], {"preset": best, "losses": scores}


if __name__ == "__main__":
    main("nncf", build, inherits=True)
