"""Trains a teacher on the official 55,000 / 5,000 split.

    python train_teacher.py [resnet|vit|twin]

Writes teacher.safetensors (vit, twin), and beside it a JSON with how it was made and what it
scores. The test set is scored once, after the last epoch; nothing is chosen by it.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import official
import torch
from resnet import ResNet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from vit import ViT

HERE = Path(__file__).parent
MEAN, STD = 0.2860, 0.3530  # of the official training images, in units of 255


def tensors(images, labels) -> tuple[Tensor, Tensor]:
    x = (torch.from_numpy(images.copy()).float().div(255) - MEAN) / STD
    return x[:, None], torch.from_numpy(labels.copy()).long()


def augment(x: Tensor, generator: torch.Generator) -> Tensor:  # [N, 1, 28, 28]
    """Mirror, shift by up to two pixels, erase a square (DeVries & Taylor 2017, "Cutout")."""
    n = len(x)
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    padded = F.pad(x, (2, 2, 2, 2), value=-MEAN / STD)
    dy, dx = torch.randint(0, 5, (2, n, 1), generator=generator)
    rows, columns = torch.arange(28) + dy, torch.arange(28) + dx
    x = padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    size = 8
    cy, cx = torch.randint(0, 28, (2, n, 1), generator=generator)
    inside_y = (torch.arange(28) - cy).abs() < size // 2
    inside_x = (torch.arange(28) - cx).abs() < size // 2
    erase = inside_y[:, :, None] & inside_x[:, None, :]
    erase &= (torch.rand(n, generator=generator) < 0.5)[:, None, None]
    return x.masked_fill(erase, 0.0)[:, None]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. file: what its weights and its score are called."""

    network: Callable[[], nn.Module]
    file: str
    epochs: int
    rate: float  # the peak of the one-cycle schedule
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.05)


RECIPES = {
    "resnet": Recipe(ResNet, "teacher", 24, 0.15, _sgd),
    "twin": Recipe(lambda: ResNet((16, 32, 64)), "twin", 8, 0.15, _sgd),
    "vit": Recipe(ViT, "vit", 8, 0.002, _adamw),
}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return 100 * hits / len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", choices=RECIPES, default="resnet")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=official.folder())
    args = parser.parse_args()
    if args.folder is None:
        raise SystemExit(f"the official Fashion-MNIST files are not on this disk: {official.HOW}")
    recipe = RECIPES[args.network]
    epochs = args.epochs or recipe.epochs
    images, labels = official.read("train", args.folder)
    seen, held = official.split(labels)
    train, val = tensors(images[seen], labels[seen]), tensors(images[held], labels[held])

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = recipe.network()
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    batch = 128
    steps = len(train[1]) // batch
    optimizer = recipe.optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.rate, total_steps=epochs * steps, pct_start=0.2
    )
    began = time.monotonic()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(train[1]), generator=generator)
        for step in range(steps):
            pick = order[step * batch : (step + 1) * batch]
            loss = F.cross_entropy(model(augment(train[0][pick], generator)), train[1][pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)
        print(
            f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}, validation "
            f"{accuracy(ema.module, *val):.2f}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        save_file(
            {k: v.contiguous() for k, v in ema.module.state_dict().items()},
            HERE / f"{recipe.file}.safetensors",
        )

    test = tensors(*official.read("t10k", args.folder))
    note = {
        "made_by": f"python train_teacher.py {args.network} --epochs {epochs} --seed {args.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_5000": accuracy(ema.module, *val),
        "official_test_10000": accuracy(ema.module, *test),
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    (HERE / f"{recipe.file}.json").write_text(json.dumps(note, indent=2) + "\n")
    print(json.dumps(note, indent=2))


if __name__ == "__main__":
    main()
