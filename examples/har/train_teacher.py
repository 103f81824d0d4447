"""Trains the teacher: ``python train_teacher.py``. A few minutes on two cores.

Writes teacher.safetensors, and teacher.json with how it was made and what it scores. The epochs are
fixed beforehand; the test subjects are looked at once, after the last of them.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import windows
from network import SignalNet
from safetensors.torch import save_file
from task import augment
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent


def tensors(part: str) -> tuple[Tensor, Tensor]:
    signals, classes = windows.read(part)
    return torch.from_numpy(signals), torch.from_numpy(classes)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    model.eval()
    answers = torch.cat([model(part) for part in x.split(256)])
    return round(100 * (answers.argmax(1) == y).double().mean().item(), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, batch = time.monotonic(), 64
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    (x, y), val = tensors("train"), tensors("val")
    model = SignalNet()
    steps = len(x) // batch
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=args.epochs * steps
    )
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for step in range(steps):
            pick = order[step * batch : (step + 1) * batch]
            output = model(augment(x[pick], generator))
            loss = F.cross_entropy(output, y[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {loss.item():.3f}, validation "
            f"{accuracy(model, *val):.2f}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, HERE / "teacher.safetensors"
    )
    test = tensors("test")
    note = {
        "made_by": f"python train_teacher.py --epochs {args.epochs} --seed {args.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "windows": {"train": len(y), "val": len(val[1]), "test": len(test[1])},
        "validation": accuracy(model, *val),
        "test": accuracy(model, *test),
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    (HERE / "teacher.json").write_text(json.dumps(note, indent=2) + "\n")
    print(json.dumps(note, indent=2))


if __name__ == "__main__":
    main()
