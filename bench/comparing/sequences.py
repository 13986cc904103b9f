"""Small models of sequences and tokens as people write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..training.models import Block
from .models import WIDTH, Head, Vectors

VOCABULARY, LENGTH = 11, 5


class Texts(Head):
    """The mean of the embeddings of tokens (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(x)).mean(1))


class Positions(Texts):
    """Positions that all samples share, looked up once."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(LENGTH, device=x.device)
        return self.head(torch.tanh(self.tokens(x) + self.positions(places)).mean(1))


class Tied(nn.Module):
    """A language model with one weight for the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.tokens(x))))


class GPT2(nn.Module):
    """GPT-2 of transformers with its tied head, without dropout; raises ImportError without transformers."""

    def __init__(self, positions_for_each: bool = False) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        without |= {"bos_token_id": None, "eos_token_id": None}
        sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, **without)).train()
        self.positions_for_each = positions_for_each

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand_as(x) if self.positions_for_each else None
        return self.gpt2(x, position_ids=positions).logits


class Transformer(Head):
    """A block with LayerNorm, of sequences (B, T, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class LSTM(Head):
    """Of sequences (B, T, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Encoder(Head):
    """torch's TransformerEncoderLayer without dropout, of sequences (B, T, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class ClassToken(Head):
    """A class token and positions as parameters, in front of a block, of sequences (B, LENGTH, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, LENGTH + 1, WIDTH))
        self.block = Block(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.block(x)[:, 0])


class Attention(Head):
    """torch's MultiheadAttention, of sequences (B, T, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class TimeFirst(Vectors):
    """The mean over time, of sequences (T, B, INPUTS)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)).mean(0)
