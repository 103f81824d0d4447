"""Three steps that articles on model acceleration often show wrongly, done right, from the top.

    python examples/article_cnn/article.py

A small CNN for colour images of 32 x 32 is trained, then pruned, distilled and quantized: each step
first as it is often shown, then as it works, then all three together. Every row of the table is an
ONNX file run by ONNX Runtime: accuracy on unseen images, size of the file, latency of one image.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flyweight.compressors import ClassificationTask, Schedule, compress, prepare
from flyweight.compressors.export import to_onnx
from flyweight.kernels import Session, make_runtime, time_sessions
from flyweight.spaces import Distill, Policy, Prune, Quantize

DATA = Path(__file__).parents[1] / "fashion_mnist" / "data"


class ArticleCnn(nn.Module):
    """conv 3 -> 32, pool, conv 32 -> 64, pool, linear 128, linear 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = nn.Linear(64 * 8 * 8, 128)
        self.linear2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32] -> [N, 10]
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.linear2(F.relu(self.linear1(torch.flatten(x, 1))))


def images(part: str, count: int) -> TensorDataset:
    """Fashion-MNIST as three channels of 32 x 32 (CIFAR-10 cannot be shipped with this)."""
    with np.load(DATA / f"{part}.npz") as file:
        grey, labels = torch.from_numpy(file["images"][:count]), torch.from_numpy(file["labels"])
    grey = F.interpolate(grey[:, None] / 255.0, size=32, mode="bilinear")
    return TensorDataset((grey - 0.286).expand(-1, 3, -1, -1) / 0.353, labels[:count].long())


def train(model: nn.Module, data: TensorDataset, epochs: int, batch: int = 64) -> None:
    """Plain supervised training."""
    x, y = data.tensors
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(epochs):
        for pick in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(model(x[pick]), y[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def changed(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of ``model`` with every weight tensor changed."""
    out = copy.deepcopy(model)
    for name, parameter in out.named_parameters():
        if name.endswith("weight"):
            parameter.data = change(parameter.data)
    return out.eval()


def main(train_images: int = 15_000, teacher_epochs: int = 4, epochs: float = 2.0) -> list[dict]:
    began = time.monotonic()
    torch.manual_seed(0)

    # The teacher: an ordinary training loop.
    data = {part: images(part, train_images) for part in ("train", "val", "test")}
    model = ArticleCnn()
    train(model, data["train"], teacher_epochs)
    model.eval()
    print(f"teacher trained in {time.monotonic() - began:.0f} s")

    # ``prepare`` traces the network: which channels belong together, which layers there are.
    task = ClassificationTask(model, data["train"], data["val"])
    runtime = make_runtime("onnxruntime", threads=1)
    prepared = prepare(task, runtime, Schedule(full_epochs=epochs, batch=64))
    halves = {name: group.width // 2 for name, group in prepared.network.groups.items()}
    int8 = dict.fromkeys(prepared.network.layers, "int8")
    example = data["test"].tensors[0][:1]
    # Nothing below is chosen by its accuracy, so validation images count as unseen too.
    unseen = TensorDataset(
        *(torch.cat(pair) for pair in zip(data["val"].tensors, data["test"].tensors, strict=True))
    )

    artifacts: dict[str, bytes] = {"the teacher": to_onnx(model, example)}

    # 1. Pruning. Often shown: a random mask. Half of the weights are zero and nothing is gained:
    # zeros are stored and multiplied like any other number, and nobody asked which weights matter.
    def mask(weight: Tensor) -> Tensor:
        return weight * (torch.rand_like(weight) > 0.5)

    masked = changed(model, mask)
    artifacts["1 wrong: random mask on half of the weights"] = to_onnx(masked, example)

    # Right: whole channels go, in every layer that knows them, so that the network is a smaller
    # one. Those go whose loss costs least (first-order Taylor), and what stays is solved anew to
    # answer for them (least squares). For comparison, the same with channels at random.
    for name, how in {
        "1 half of the channels, at random": Prune(halves, "random"),
        "1 right: half of the channels, by importance": Prune(halves, "taylor", reconstruct=True),
    }.items():
        artifacts[name] = compress(prepared, Policy(how), "recalibrate").model

    # 2. Distillation. Often shown: the teacher is called and its answer never used, so that the
    # student learns from the labels alone. Right: it learns the teacher's softened answers (Hinton
    # et al. 2015). The same student, the same number of images. (Which is the more accurate depends
    # on how good the teacher is: see the README.)
    pruned = Prune(halves, "taylor", reconstruct=True)
    alphas = {"2 wrong: labels alone": 0.0, "2 right: the teacher's answers": 0.9}
    for name, alpha in alphas.items():
        policy = Policy(pruned, distill=Distill(alpha=alpha, temperature=4.0, learning_rate=0.02))
        artifacts[f"{name}, after 1"] = compress(prepared, policy, "full").model

    # 3. Quantization. Often shown: integer division by one scale for all. Division of integers
    # rounds down, so that every weight loses half a step on average, and all in one direction; and
    # what is stored and computed with is still float.
    def divide(weight: Tensor) -> Tensor:
        scale = weight.abs().max() / 127
        return weight // scale * scale

    artifacts["3 wrong: integer division"] = to_onnx(changed(model, divide), example)

    # Right: rounded to nearest, a scale for every output channel, the values between layers
    # quantized too (ranges from calibration images), so that the runtime computes in integers.
    quantized = Quantize(int8, "mse")
    artifacts["3 right: static int8"] = compress(
        prepared, Policy(quantize=quantized), "recalibrate"
    ).model

    # All three: pruned, distilled, then quantized.
    together = Policy(pruned, quantized, Distill(alpha=0.9, temperature=4.0, learning_rate=0.02))
    artifacts["1 + 2 + 3 right"] = compress(prepared, together, "full").model

    # What each is worth, in the runtime.
    sessions = {name: runtime.load(content) for name, content in artifacts.items()}
    timings = time_sessions(sessions, {"input": example.numpy()})
    base = timings["the teacher"].median_ms
    rows = [
        {
            "step": name,
            "accuracy": accuracy(sessions[name], unseen),
            "size_kb": len(content) / 1e3,
            "latency_ms": timings[name].median_ms,
            "speedup": base / timings[name].median_ms,
        }
        for name, content in artifacts.items()
    ]
    print("\n| step | accuracy | size | latency | speed |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['step']} | {row['accuracy']:.2f}% | {row['size_kb']:,.0f} kB | "
            f"{row['latency_ms']:.3f} ms | {row['speedup']:.2f}x |"
        )
    print(f"\n{len(unseen)} unseen images; {time.monotonic() - began:.0f} s in all")
    return rows


def accuracy(session: Session, data: TensorDataset) -> float:
    """In percent."""
    x, y = data.tensors
    answers = np.concatenate([session.run({"input": part.numpy()}) for part in x.split(100)])
    return 100 * float((answers.argmax(1) == y.numpy()).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-images", type=int, default=15_000)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=2.0, help="of the distillation")
    main(**vars(parser.parse_args()))
