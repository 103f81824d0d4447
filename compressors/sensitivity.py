"""How much one policy harms a network that is not trained afterwards, cheaply."""

import torch

from ..spaces import Impossible, Policy
from .compress import prune, quantize, renew_statistics
from .distill import kl_divergence
from .parity import run_module
from .prepared import Prepared

ITEMS = 512  # of search validation: single choices differ by far more than so many leave open


def harm(prepared: Prepared, policy: Policy, seed: int = 0, *, recalibrated: bool = False) -> float:
    """KL(teacher || student) on search validation, in nats, of the student that ``policy`` starts
    its training from: pruned, recalibrated and quantized as at the lowest rung.

    recalibrated: its statistics are recomputed even if nothing is pruned, as those of every pruned
    student are; what that harms by itself. Forward only and in PyTorch: nothing is trained,
    exported or loaded into a runtime. Raises Impossible if the policy cannot be built or its
    student answers NaN.
    """
    plan = prepared.plan(policy)
    torch.manual_seed(seed)
    pruned = prune(prepared, policy, plan)
    if recalibrated and not policy.prune.acts:
        renew_statistics(pruned, prepared, plan)
    student = quantize(prepared, policy, plan, pruned)
    some = prepared.splits.search.first(ITEMS)
    answers = prepared.search_answers[: len(some)]
    found = kl_divergence(run_module(student, some), answers, kind=prepared.kind).item()
    if not found < float("inf"):
        raise Impossible(f"the student's answers are not finite (KL {found})")
    return max(found, 0.0)
