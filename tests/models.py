"""Whole models, written the way people write them, small enough for the oracle."""

import torch
import torch.nn.functional as F
from torch import nn


def mlp():
    """Linear layers with an activation in place among others."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class Attention(nn.Module):
    """Self-attention by torch's function, from one product for queries, keys and values."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Positions looked up once for the whole batch; the head tied to the token embedding."""

    def __init__(self, vocabulary=11, width=8, length=9, leading=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, 2, causal=True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.leading = leading

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.tokens(x) + self.positions(positions[None] if self.leading else positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """A class token and positions as raw parameters of the model."""

    def __init__(self, width=8, patches=4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width))
        self.blocks = nn.Sequential(Block(width, 2, causal=False), Block(width, 2, causal=False))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Residual(nn.Module):
    """A residual block with group normalisation and activations in place."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(2, out), nn.GroupNorm(2, out)
        self.relu = nn.ReLU(inplace=True)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def resnet():
    """Two residual blocks between a convolution and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        Residual(4, 4, 1),
        Residual(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class LSTMClassifier(nn.Module):
    """Outputs and last states of stacked layers in both directions, of padded tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        output, (hidden, _) = self.lstm(self.embedding(x))
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1) + output.mean(1))


class Net(nn.Module):
    """A module from parts: `parts` become attributes or buffers, `forward(self, *inputs)` is given."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._forward = forward

    def forward(self, *inputs):
        return self._forward(self, *inputs)


def two_layers(forward):
    """A `Net` with linear layers `a`, of 5 inputs, and `b`, of 4."""
    return Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2))


class Encoder(nn.Module):
    """Tokens and positions, which all samples share, in front of a head."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 4), nn.Embedding(20, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.tokens(x) + self.positions(torch.arange(x.shape[1])))


class Siamese(nn.Module):
    """One encoder called twice."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, left, right):
        left, right = self.encoder(left), self.encoder(right)
        return torch.stack([F.cosine_similarity(left, right), (left - right).square().sum(1)], 1)


def images(batch):
    """One input of single-channel images."""
    return [torch.randn(batch, 1, 8, 8)]


def tokens(batch):
    """One input of sequences of tokens."""
    return [torch.randint(11, (batch, 9))]


MODELS = {
    "MLP": (mlp, lambda b: [torch.randn(b, 6)]),
    "GPT": (GPT, tokens),
    "GPT, positions (1, T)": (lambda: GPT(leading=True), tokens),
    "ViT": (ViT, images),
    "ResNet": (resnet, images),
    "LSTM classifier": (LSTMClassifier, tokens),
    "siamese": (Siamese, lambda b: [torch.randn(b, 6), torch.randn(b, 6)]),
}
