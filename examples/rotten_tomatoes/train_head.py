"""Trains the head on the encoder's answers: ``python train_head.py``.

The encoder stays as it is, so its answers are computed once. Weight decay is chosen on val; test is
scored once, at the end. Writes head.safetensors, and head.json with how it was made.
"""

import json
import platform
import time
from pathlib import Path

import torch
from minilm import MiniLM
from reviews import Reviews, splits
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@torch.no_grad()
def features(encoder: MiniLM, reviews: Reviews) -> Tensor:  # [N, 384]
    batches = zip(*(v.split(100) for v in reviews.inputs.values()), strict=True)
    return torch.cat([encoder(*batch) for batch in batches])


def fit(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    """Logistic regression: the weights of least loss plus ``decay`` times their squares."""
    head = nn.Linear(x.shape[1], 2)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def accuracy(head: nn.Linear, x: Tensor, y: Tensor) -> float:
    return 100 * (head(x).argmax(1) == y).double().mean().item()


def main() -> None:
    began = time.monotonic()
    encoder = MiniLM.pretrained()
    train, val, test = ((features(encoder, part), part.labels) for part in splits())
    heads = {decay: fit(*train, decay) for decay in DECAYS}
    scores = {decay: accuracy(head, *val) for decay, head in heads.items()}
    best = max(scores, key=scores.__getitem__)
    head = heads[best]
    save_file({k: v.detach() for k, v in head.state_dict().items()}, HERE / "head.safetensors")
    note = {
        "made_by": "python train_head.py",
        "sentences": {"train": len(train[1]), "val": len(val[1]), "test": len(test[1])},
        "weight_decay": best,
        "accuracy": {name: accuracy(head, *part)
                     for name, part in (("train", train), ("val", val), ("test", test))},
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }  # fmt: skip
    (HERE / "head.json").write_text(json.dumps(note, indent=2) + "\n")
    print(json.dumps(note, indent=2))


if __name__ == "__main__":
    main()
