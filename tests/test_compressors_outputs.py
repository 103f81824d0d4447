"""What an output is, found out from a loss; and networks that give something else than classes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flyweight.compressors.distill import kl_divergence
from flyweight.compressors.outputs import OutputKind, kind_of

N = 40
GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(N, 4, generator=GENERATOR) * 5
PIXELS = torch.randn(N, 3, 6, 5, generator=GENERATOR)
CLASSES = torch.randint(0, 3, (N,), generator=GENERATOR)
MASKS = torch.randint(0, 3, (N, 6, 5), generator=GENERATOR)


def steps(output: Tensor, target: Tensor) -> Tensor:  # [N, T, C], [N, T]
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.mark.parametrize(
    ("loss", "output", "target", "axis", "probabilities"),
    [
        (F.cross_entropy, SCORES, CLASSES, 1, False),
        (F.cross_entropy, PIXELS, MASKS, 1, False),
        (steps, PIXELS[:, 0, :, :3], MASKS[:, :, 0], 2, False),
        (F.nll_loss, SCORES.log_softmax(1), CLASSES, 1, False),
        (F.mse_loss, SCORES.softmax(1), SCORES, 1, True),
        (F.multi_margin_loss, SCORES, CLASSES, 1, False),
        (F.mse_loss, SCORES, SCORES + 1, None, False),
        (F.mse_loss, SCORES[:, :1], CLASSES[:, None].float(), None, False),
        (F.l1_loss, SCORES[:, 0], CLASSES.float(), None, False),
        (F.smooth_l1_loss, SCORES, SCORES.flip(0), None, False),
        (F.mse_loss, PIXELS.sigmoid(), PIXELS, None, False),
        (F.mse_loss, 0.5 + 1e-4 * PIXELS, PIXELS, None, False),  # of one that learned nothing
        (F.cross_entropy, 40 * F.one_hot(CLASSES, 4).float(), CLASSES, 1, False),  # and too much
    ],
)  # fmt: skip
def test_a_loss_says_what_an_output_is(
    loss: Any, output: Tensor, target: Tensor, axis: int | None, probabilities: bool
) -> None:
    found = kind_of(loss, output, target)
    assert (found.axis, found.probabilities, found.labels) == (axis, probabilities, False)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target, pos_weight=torch.tensor(3.0))


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, weighted])
@pytest.mark.parametrize("output", [SCORES, SCORES[:, :1], SCORES[:, 0], PIXELS[:, :1]])
def test_a_loss_says_that_labels_exclude_each_other_not(loss: Any, output: Tensor) -> None:
    assert kind_of(loss, output, (output.flip(0) > 0).float()) == OutputKind(None, labels=True)


def test_a_loss_may_take_nothing_but_probabilities() -> None:
    chances = SCORES.sigmoid()
    kind = kind_of(F.binary_cross_entropy, chances, (SCORES > 0).float())
    assert kind == OutputKind(None, probabilities=True, labels=True)
    found = kl_divergence(chances.flip(0), chances, 2.0, kind)
    expected = kl_divergence(SCORES.flip(0), SCORES, 2.0, OutputKind(None, labels=True))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)  # clamped
    assert kind.same(chances, chances.round(), 0).all()


def test_labels_are_compared_one_by_one() -> None:
    kind, other = OutputKind(None, labels=True), SCORES.flip(0)
    p, q = SCORES.double().sigmoid(), other.double().sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = kl_divergence(other, SCORES, kind=kind)
    assert found.item() == pytest.approx(expected.sum(1).mean().item(), rel=1e-3)
    assert kl_divergence(SCORES, SCORES, 2.0, kind) == 0
    assert kl_divergence(SCORES + 1, SCORES, kind=kind) > 0.01  # a softmax would not see it
    assert kind.same(SCORES, SCORES * 0.01, 0).all()


def test_labels_that_both_networks_rule_out_weigh_nothing_at_any_temperature() -> None:
    kind = OutputKind(None, labels=True)

    def slope(labels: int, temperature: float) -> float:
        """Of one label on which they disagree, beside others as a network of hundreds has them."""
        student, teacher = torch.full((N, labels), -10.0), torch.full((N, labels), -9.0)
        student[:, 0], teacher[:, 0] = -1, 1
        student.requires_grad_()
        found = kl_divergence(student, teacher, temperature, kind)
        return torch.autograd.grad(found, student)[0].norm().item()

    for temperature in (1.0, 4.0, 8.0):
        assert slope(360, temperature) == pytest.approx(slope(1, 1.0), rel=0.01)


def test_quantities_are_compared_as_such() -> None:
    kind = kind_of(F.mse_loss, PIXELS, PIXELS)
    near, far = PIXELS + 0.01, PIXELS + 1
    assert kl_divergence(PIXELS, PIXELS, kind=kind) == 0
    assert 0 < kl_divergence(near, PIXELS, kind=kind) < kl_divergence(far, PIXELS, kind=kind)
    # In other units, and softened, it is the same.
    metres, other = kind_of(F.mse_loss, PIXELS * 1e3, PIXELS), kl_divergence(far, PIXELS, kind=kind)
    assert torch.allclose(kl_divergence(far * 1e3, PIXELS * 1e3, 4.0, metres), other)
    # A mean instead of all answers: half a nat.
    mean = PIXELS.mean().expand_as(PIXELS)
    assert kl_divergence(mean, PIXELS, kind=kind).item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("output", "axis"),
    [
        (PIXELS[:, :, 0, 0], 1),
        (PIXELS, 1),
        (PIXELS[:, :, 0], 1),  # [N, channels, steps]
        (PIXELS[:, :, 0].transpose(1, 2), 2),  # [N, steps, features]
    ],
)
def test_every_channel_has_units_of_its_own(output: Tensor, axis: int) -> None:
    channels = torch.tensor([1e3, 1.0, 1e-1]).reshape(
        [-1 if a == axis else 1 for a in range(output.ndim)]
    )
    output = output * channels + 7
    kind = kind_of(F.mse_loss, output, output + 1)
    for number in range(3):  # its mean instead of its values: half a nat, of three channels
        student = output.clone()
        part = student.select(axis, number)
        part.copy_(part.mean().expand_as(part))
        assert kl_divergence(student, output, kind=kind).item() == pytest.approx(1 / 6, rel=1e-3)


def test_a_constant_output_has_the_scale_of_the_others() -> None:
    output = torch.cat([SCORES, torch.zeros(N, 1), torch.full((N, 1), 3.0)], 1)
    kind = kind_of(F.mse_loss, output, output + 1)
    off = output + torch.tensor([0, 0, 0, 0, 5.0, 5.0])  # by about their deviation
    assert 0.05 < kl_divergence(off, output, kind=kind) < 1
    same = torch.full((N, 2), 3.0)  # of a teacher that learned nothing
    assert torch.isfinite(kl_divergence(same + 0.1, same, kind=kind_of(F.mse_loss, same, same + 1)))


def test_classes_lie_where_the_kind_says() -> None:
    there, last = OutputKind(1), PIXELS.movedim(1, -1)
    shifted = PIXELS + torch.randn(N, 1, 6, 5, generator=GENERATOR)  # the same probabilities
    assert kl_divergence(shifted, PIXELS, kind=there).item() == pytest.approx(0, abs=1e-6)
    other = PIXELS.flip(0)
    assert torch.allclose(
        kl_divergence(other, PIXELS, 2.0, there), kl_divergence(other.movedim(1, -1), last, 2.0)
    )
    chances = OutputKind(1, probabilities=True)
    found = kl_divergence(other.softmax(1), PIXELS.softmax(1), kind=chances)
    assert torch.allclose(found, kl_divergence(other, PIXELS, kind=there), atol=1e-5)
