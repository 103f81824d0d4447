"""NNCF's post-training int8 on the students of ``hand``.

NNCF 3 has no pruning of channels left (``nncf.prune`` zeroes single weights), so the student is the
recipe's. As its documentation says for the best accuracy, both bias corrections and both presets
are tried; the nearest to the teacher on search validation counts.
"""

from itertools import product
from typing import Any

import nncf
import onnx
from shared import Order, main

PRESETS = {
    "performance": nncf.QuantizationPreset.PERFORMANCE,
    "mixed": nncf.QuantizationPreset.MIXED,
}


def build(order: Order) -> tuple[bytes, dict[str, Any]]:
    bench = order.bench
    items = bench.calibration
    requests = [{"input": batch.inputs.numpy()} for batch in items.batches(1)]
    fp32 = onnx.load(order.student)
    made = {}
    for preset, fast in product(PRESETS, (True, False)):
        model = nncf.quantize(
            fp32, nncf.Dataset(requests), subset_size=len(items), preset=PRESETS[preset],
            fast_bias_correction=fast, target_device=nncf.TargetDevice.CPU,
        )  # fmt: skip
        name = f"{preset}, {'fast' if fast else 'full'} bias correction"
        made[name] = model.SerializeToString()
    scores = {name: bench.scores(model)["loss"] for name, model in made.items()}
    print(f"  {scores}", flush=True)
    best = min(scores, key=scores.__getitem__)
    return made[best], {"quantizer": best}


if __name__ == "__main__":
    main("nncf", build, inherits=True)
