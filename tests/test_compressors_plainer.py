"""Modules that nothing has a rule for are compressed as the plain ones that they amount to."""

from typing import Any

import torch
from executed import int8_layers
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.compressors import ClassificationTask, Schedule, compress, prepare
from flyweight.kernels import make_runtime
from flyweight.spaces import Policy, Prune, Quantize


class Pictures(list[Any]):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        super().__init__((torch.randn(3, 6, 6, generator=generator), i % 3) for i in range(count))


class Reflects(nn.Module):
    """A convolution that pads by reflection and runs twice, and norms over several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(8, 8, (3, 1), padding="same", padding_mode="circular", bias=False)
        self.n, self.m = nn.SyncBatchNorm(8), nn.SyncBatchNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x) + self.a(x.flip(3)))
        x = self.b(F.relu(self.n(self.b(x))))
        return self.head(self.m(F.relu(x).mean((2, 3))))


def test_modules_without_a_rule_are_plain_ones() -> None:
    torch.manual_seed(0)
    model, example = Reflects().eval(), torch.rand(1, 3, 6, 6)
    for norm in (model.n, model.m):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var)
    ready = prepare(
        ClassificationTask(model, Pictures(24), Pictures(40)),
        make_runtime("onnxruntime", 1),
        Schedule(),
    )
    kinds = [type(ready.teacher.get_submodule(name)) for name in ("a", "n", "m")]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d]
    assert torch.allclose(ready.teacher(example), model(example), atol=1e-6)
    assert ready.teacher.state_dict().keys() == model.state_dict().keys()
    assert set(ready.network.groups) == {"a"}
    policy = Policy(Prune({"a": 4}), Quantize({"a": "int8", "b": "int8"}))
    found = compress(ready, policy, "full")
    assert int8_layers(found.model) == 4
