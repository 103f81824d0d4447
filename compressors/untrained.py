"""The artifact of a policy as far as its latency goes: right kernels, arbitrary weights."""

from ..spaces import Policy
from .export import to_onnx
from .freeze import freeze
from .prepared import Prepared
from .prune import shaped
from .quantize import calibrate, fold_norms, insert_quantizers, settle
from .sparsify import sparsify_

ITEMS = 8  # enough for ranges that are not degenerate


def untrained(prepared: Prepared, policy: Policy) -> bytes:
    """An ONNX file with the kernels that ``policy`` gives; what it answers means nothing.

    Which channels stay does not change what the runtime executes, so no importance is computed
    and nothing is trained. Raises Impossible.
    """
    start = prepared.start(policy)
    plan = prepared.plan(policy)
    pruned = shaped(start.model, start.network, prepared.example, policy.prune)
    if policy.prune.sparsity:
        sparsify_(pruned, plan.network, policy.prune.sparsity)
    student = fold_norms(pruned, plan.network)
    if plan.quantized:
        student = insert_quantizers(student, plan, "minmax")
        calibrate(student, prepared.splits.calibration.first(ITEMS), "minmax")
        settle(student, plan.network, plan)
    return to_onnx(freeze(student), prepared.example)
