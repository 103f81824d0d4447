"""Which students train in bfloat16: those to whom it does no harm, and whom it makes faster."""

import copy
import functools
import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .data import Items
from .distill import CPU, kl_divergence
from .mixed import is_native, mixed
from .outputs import OutputKind
from .parity import run_module
from .prepared import Prepared
from .prune import call

TRIED = 16  # items of search validation
# KL, or what stands for it, by which bfloat16 may change the answers of a network. Of quantities,
# whose students are trained however near they are, much less: at 0.001 training in it harmed.
CHANGED = {"classes": 0.002, "quantities": 1e-4}
ROUNDS = 5  # of a step in either
FASTER = 1.1  # times as fast as float32 that is worth its rounding


def in_bfloat16(prepared: Prepared, students: Iterable[str], gpus: bool) -> list[str]:
    """Those of ``students`` that are to train in bfloat16 on devices that multiply so. gpus:
    whether they train on GPUs, where it is taken to be faster; on CPUs that is tried, here."""
    if not (gpus or is_native(CPU)):
        return []
    return [name for name in students if _pays(prepared, name, gpus)]


def _pays(prepared: Prepared, student: str, gpus: bool) -> bool:
    model, kind, answers = prepared.starts[student].model, prepared.kind, prepared.search_answers
    if gpus and any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return False  # there autocast takes float16 for them
    quantities = kind.axis is None and not kind.labels
    shares = quantities and bool((answers >= 0).all() and (answers <= 1).all())
    if kind.probabilities or shares:
        return False  # near 1 they round to 1, and the loss takes the logarithm of the rest
    step = Step(model, prepared.splits.search.first(TRIED), kind)
    most = CHANGED["quantities" if quantities else "classes"]
    return step.holds(most) and (gpus or step.is_faster())


class Step:
    """A step of training ``model`` on ``items``, on a copy, on this CPU. kind: of its output."""

    def __init__(self, model: nn.Module, items: Items, kind: OutputKind) -> None:
        self._model, self._items = copy.deepcopy(model), items
        self._answers = run_module(self._model, items)
        self._divergence = functools.partial(kl_divergence, kind=kind)
        self._weights = [
            p.requires_grad_() for p in self._model.parameters() if p.is_floating_point()
        ]

    def holds(self, most: float) -> bool:
        """Whether the model can be trained so: it computes and differentiates, and its answers
        depart from those that it has in float32 by less than ``most``. What it regresses may be
        beyond bfloat16's three digits, and the user's code may mix types where autocast does
        not."""
        try:
            changed, gradients = self._take(True)
        except Exception:  # the user's code, which runs in float32
            return False
        return abs(changed) < most and all(gradient.isfinite().all() for gradient in gradients)

    def is_faster(self) -> bool:
        """Whether it is quicker in bfloat16 than in float32: small layers are slower, as are
        convolutions of single channels."""
        self._take(False), self._take(True)  # kernels are set up
        ratios = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            self._take(False)
            between = time.perf_counter()
            self._take(True)
            ratios.append((between - began) / (time.perf_counter() - between))
        return statistics.median(ratios) > FASTER

    def _take(self, halves: bool) -> tuple[float, list[Tensor]]:
        """How far the answers depart, and the gradients of that."""
        with torch.random.fork_rng([]):  # what a model draws is not taken from its training
            with mixed(CPU, halves):
                output = call(self._model, self._items.inputs)
            departs = self._divergence(output.float(), self._answers)
            found = torch.autograd.grad(departs, self._weights, allow_unused=True)
        return departs.item(), [gradient for gradient in found if gradient is not None]
