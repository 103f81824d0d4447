"""EfficientNet-Lite0: EfficientNet (Tan and Le 2019) without swish and squeeze-and-excitation.

Named as the package `efficientnet_lite_pytorch` names it, so that its weights load.
"""

import torch
from torch import Tensor, nn

# Expansion, kernel, channels, blocks, stride of the first.
STAGES = (
    (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2), (6, 3, 320, 1, 1),
)  # fmt: skip
EPSILON = 1e-3  # of the norms: TensorFlow's


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Without bias; where it has a stride, ``pad`` goes before it."""
    padding = (kernel - 1) // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def pad(kernel: int, stride: int) -> nn.Module:
    """What TensorFlow's "SAME" adds to an even size: the odd row at the end."""
    before = (kernel - stride) // 2
    after = kernel - stride - before
    return nn.ZeroPad2d((before, after, before, after)) if stride > 1 else nn.Identity()


class Block(nn.Module):
    """Expansion, depthwise convolution, linear projection; a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands, self.short = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = convolution(inputs, hidden, 1)
            self._bn0 = nn.BatchNorm2d(hidden, EPSILON)
        self._pad = pad(kernel, stride)
        self._depthwise_conv = convolution(hidden, hidden, kernel, stride, hidden)
        self._bn1 = nn.BatchNorm2d(hidden, EPSILON)
        self._project_conv = convolution(hidden, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, EPSILON)
        self._act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self._act(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._act(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.short else y


class EfficientNetLite0(nn.Module):
    """Images [N, 3, 224, 224], normalised, to logits [N, 1000]. 4.7 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._pad, self._act = pad(3, 2), nn.ReLU6()
        self._conv_stem = convolution(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, EPSILON)
        self._blocks, inputs = nn.ModuleList(), 32
        for expansion, kernel, outputs, count, stride in STAGES:
            for i in range(count):
                step = stride if i == 0 else 1
                self._blocks.append(Block(inputs, outputs, kernel, step, expansion))
                inputs = outputs
        self._conv_head = convolution(inputs, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, EPSILON)
        self._pool = nn.AdaptiveAvgPool2d(1)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._act(self._bn0(self._conv_stem(self._pad(x))))
        for block in self._blocks:
            x = block(x)
        x = self._act(self._bn1(self._conv_head(x)))
        return self._fc(torch.flatten(self._pool(x), 1))
