"""Functions with weights become the modules that they are, and can be compressed like them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.compressors import ClassificationTask, Schedule, compress, prepare
from flyweight.compressors.modules import _is_same, with_modules
from flyweight.kernels import make_runtime
from flyweight.spaces import Distill, Policy, Prune
from flyweight.spaces.tracing import trace

Function = Callable[[nn.Module, Tensor], Tensor]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 3)


class Images(nn.Module):
    """Two layers, and between them a function with weights on images."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)
        self.weight, self.bias = parameter(16), parameter(16)
        self.kernel, self.depth = parameter(16, 16, 3, 3), parameter(16, 1, 3, 3)
        self.matrix = parameter(16, 16)
        self.register_buffer("mean", torch.rand(16))
        self.register_buffer("blur", torch.ones(16, 1, 2, 2) / 4)
        self.register_buffer("variance", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 6, 6]
        return self.head(self.b(self.function(self, self.a(x).relu()).relu()).mean((2, 3)))  # type: ignore[no-any-return]


class Steps(nn.Module):
    """The same on sequences."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.weight, self.bias, self.matrix = parameter(16), parameter(16), parameter(16, 16)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 6]
        return self.head(self.b(self.function(self, self.a(x).relu()).relu()).mean(1))  # type: ignore[no-any-return]


def standardized(m: Any, x: Tensor) -> Tensor:
    """Qiao et al. 2019, "Weight standardization"."""
    mean = m.kernel.mean((1, 2, 3), keepdim=True)
    weight = (m.kernel - mean) / (m.kernel.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    return F.conv2d(x, weight, m.bias, padding=1)


def channels_last(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (16,), m.weight, m.bias, 1e-6).permute(0, 3, 1, 2)


IMAGES: dict[str, tuple[Any, int]] = {  # a function, and how many layers it is
    "conv": (lambda m, x: F.conv2d(x, m.kernel, m.bias, padding=1), 1),
    "strided": (lambda m, x: F.conv2d(x, weight=m.kernel, stride=2, dilation=2, padding=(2, 1)), 1),
    "depthwise": (lambda m, x: F.conv2d(x, m.depth, None, 1, "same", 1, 16), 1),
    "blurred": (lambda m, x: F.conv2d(x, m.blur, stride=2, groups=x.shape[1]), 1),
    "standardized": (standardized, 1),
    "einsum": (lambda m, x: torch.einsum("bchw, cd -> bdhw", x, m.matrix), 1),
    "layer norm": (channels_last, 0),
    "group norm": (lambda m, x: F.group_norm(x, 4, m.weight, m.bias), 0),
    "batch norm": (lambda m, x: F.batch_norm(x, m.mean, m.variance, m.weight, m.bias), 0),
}
STEPS: dict[str, tuple[Any, int]] = {
    "linear": (lambda m, x: F.linear(x, m.matrix, m.bias), 1),
    "product": (lambda m, x: x @ m.matrix + m.bias, 1),
    "transposed": (lambda m, x: torch.matmul(x, m.matrix.t()), 1),
    "addmm": (lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.matrix).view(-1, 5, 16), 1),
    "einsum": (lambda m, x: torch.einsum("ntc,dc->ntd", x, m.matrix), 1),
    "layer norm": (lambda m, x: F.layer_norm(x, [16], m.weight), 0),
}
CASES = [(Images, (3, 6, 6), *case) for case in IMAGES.values()]
CASES += [(Steps, (5, 6), *case) for case in STEPS.values()]


@pytest.mark.parametrize(
    ("kind", "shape", "function", "layers"), CASES, ids=[*IMAGES, *(f"steps: {n}" for n in STEPS)]
)
def test_a_function_with_weights_is_compressed_as_the_module_that_it_is(
    kind: Any, shape: tuple[int, ...], function: Function, layers: int
) -> None:
    model, example, more = kind(function).eval(), torch.rand(1, *shape), torch.rand(7, *shape)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = with_modules(model, example)
    torch.testing.assert_close(found(more), model(more), rtol=1e-4, atol=1e-5)
    network = trace(found, example)
    assert len(network.layers) == 3 + layers
    whole = [name for name, layer in network.layers.items() if layer.out_group is None]
    assert whole == ["head"]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


class Padded(nn.Conv2d):
    """A layer with a forward of its own, as TensorFlow pads."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Normed(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def test_a_layer_with_a_forward_of_its_own_keeps_its_name() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(Padded(3, 16, 2), Normed(16), nn.ReLU(), Padded(16, 16, 2, stride=2))
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()
    network = trace(with_modules(model, torch.rand(1, 3, 6, 6)), torch.rand(1, 3, 6, 6))
    assert list(network.layers) == ["0.0", "0.3", "3"]
    assert list(network.groups) == ["0.0", "0.3"]
    assert network.layers["0.3"].stride == (2, 2)


class Twice(nn.Module):
    """A weight that is read twice, and one that a layer has too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.head = nn.Embedding(9, 8), parameter(8, 8), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T]
        x = self.words(x)
        x = F.linear(F.linear(x, self.mix).relu(), self.mix)
        return self.head(F.linear(x, self.words.weight).mean(1))  # type: ignore[no-any-return]


def test_a_function_that_is_called_twice_is_one_layer() -> None:
    model, words = Twice().eval(), torch.randint(0, 9, (1, 4))
    found = with_modules(model, words)
    torch.testing.assert_close(found(words), model(words))
    network = trace(found, words)
    assert list(network.layers) == ["mix_linear", "words.weight_linear", "head"]
    assert len(network.uses["mix_linear"]) == 2


def test_what_is_worked_out_from_a_request_is_no_weight() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a(x))

    model = Gated().eval()
    assert with_modules(model, torch.rand(1, 4)) is model


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: torch.einsum("bcd->bcd", x),
        lambda m, x: torch.matmul(x, other=m.matrix),
    ],
)
def test_products_without_a_weight_or_with_keywords_are_no_crash(function: Any) -> None:
    model, example = Steps(function).eval(), torch.rand(1, 5, 6)
    torch.testing.assert_close(with_modules(model, example)(example), model(example))


def test_a_tied_decoder_leaves_the_model_as_it_was_or_computes_the_same() -> None:
    model = Steps(lambda m, x: F.linear(F.linear(x, m.matrix[:8]).relu(), m.matrix[:8].t())).eval()
    example = torch.rand(1, 5, 6)
    torch.testing.assert_close(with_modules(model, example)(example), model(example))


def test_a_layer_that_has_the_name_of_a_new_one_stays() -> None:
    class Named(Steps):
        def __init__(self) -> None:
            super().__init__(lambda m, x: F.linear(m.matrix_linear(x), m.matrix))
            self.matrix_linear = nn.Linear(16, 16)

    model, example = Named().eval(), torch.rand(1, 5, 6)
    found = with_modules(model, example)
    torch.testing.assert_close(found(example), model(example))
    assert len([m for m in found.modules() if isinstance(m, nn.Linear)]) == 5


class Filtered(nn.Module):
    """A filter bank that is a buffer, a projection that is frozen, and weights that are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("bank", torch.randn(16, 6))
        self.projection, self.matrix = parameter(16, 16), parameter(16, 16)
        self.projection.requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 6]
        x = F.linear(x, self.bank).relu()
        x = (x @ self.projection).relu()
        return self.head((x @ (2 * self.matrix)).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        (False, {"matrix_linear.weight", "head.weight", "head.bias"}),
        # Frozen as a whole, as some leave a model that is only run: that says nothing.
        (True, {"projection_linear.weight", "matrix_linear.weight", "head.weight", "head.bias"}),
    ],
)
def test_a_buffer_and_a_frozen_weight_are_not_trained(frozen: bool, trained: set[str]) -> None:
    model = Filtered()
    if frozen:
        model.requires_grad_(False)
    data = [(torch.randn(6), i % 3) for i in range(40)]
    task = ClassificationTask(model, data, data)
    prepared = prepare(task, make_runtime("onnxruntime", 1), Schedule(2, 0.5, 8))
    assert not any(p.requires_grad for p in prepared.teacher.parameters())
    policy = Policy(Prune({"matrix_linear": 8}), distill=Distill(learning_rate=0.05))
    first = compress(prepared, policy, "recalibrate")
    then = compress(prepared, policy, "short", first)
    before = dict(first.student.named_parameters())
    moved = {n for n, p in then.student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


class Fixed(nn.Module):
    """What ``model`` answers to one request, whatever it is asked."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.answer = model(example)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.expand(len(x), -1)  # type: ignore[no-any-return]


class OneByOne(Steps):
    """Takes no batch of several."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(1, 5, 6))


def test_what_is_right_for_the_example_alone_is_not_the_same() -> None:
    model, example = Steps(STEPS["linear"][0]).eval(), torch.rand(1, 5, 6)
    assert _is_same(model, model, example)
    assert not _is_same(Fixed(model, example), model, example)


def test_a_model_for_one_request_is_compared_on_that() -> None:
    model, example = OneByOne(STEPS["linear"][0]).eval(), torch.rand(1, 5, 6)
    assert _is_same(Fixed(model, example), model, example)
    assert with_modules(model, example) is not model


def test_requests_of_words_and_masks_are_compared_too() -> None:
    class Masked(Twice):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.where(mask, x, 0))

    mask = torch.tensor([[True, True, True, False]])
    model, request = Masked().eval(), {"x": torch.tensor([[1, 8, 3, 2]]), "mask": mask}
    found = with_modules(model, request)
    assert found is not model
    torch.testing.assert_close(found(**request), model(**request))
