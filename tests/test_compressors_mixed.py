"""Training that multiplies in bfloat16. Where the processor has none it is emulated: slow, but the
same."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.compressors.data import Items
from flyweight.compressors.distill import CPU, kl_divergence
from flyweight.compressors.mixed import holds, mixed
from flyweight.compressors.outputs import OutputKind


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return nn.Sequential(*layers).eval()


def held(model: nn.Module, inputs: Tensor, kind: OutputKind | None = None) -> bool:
    with torch.no_grad():
        answers = model(inputs)
    items = Items(inputs, torch.zeros(len(inputs), dtype=torch.long))
    divergence = partial(kl_divergence, kind=kind) if kind else kl_divergence
    return holds(model, items, answers, divergence, CPU)


def test_a_network_of_classes_trains_so() -> None:
    assert held(network(), torch.randn(32, 1, 8, 8))


@pytest.mark.parametrize(("away", "expected"), [(0.0, True), (1000.0, False)])
def test_quantities_beyond_its_three_digits_do_not(away: float, expected: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    nn.init.constant_(model.bias, away)
    inputs = torch.randn(64, 8)
    kind = OutputKind(axis=None, variance=model(inputs).detach().var())
    assert held(model, inputs, kind) is expected


class Copies(nn.Module):
    """Code that autocast does not know: it raises where types differ."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 4).index_copy_(0, torch.arange(len(x)), self.layer(x))


def test_code_that_mixes_types_stays_in_float() -> None:
    assert not held(Copies(), torch.randn(16, 8))


def test_the_model_that_is_asked_about_stays_as_it_is() -> None:
    model = network().requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    assert held(model, torch.randn(8, 1, 8, 8))
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)
        assert now.grad is None
        assert not now.requires_grad


def test_attention_stays_in_float() -> None:
    """There its gradient is slow, and no more exact."""
    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    with mixed(CPU):
        half = F.linear(x, torch.randn(8, 8))
        out = F.scaled_dot_product_attention(half, half, value=half)
    assert (half.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    with mixed(CPU, enabled=False):
        assert F.linear(x, torch.randn(8, 8)).dtype == torch.float32
