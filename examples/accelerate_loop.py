"""Accelerate: with gradient accumulation a step takes the direction of the union of its micro-batches.

    python examples/accelerate_loop.py     # needs accelerate and scikit-learn

It prints the loss on all data after each epoch, whatever the micro-batches are:

    micro-batches   epoch-1   epoch-2   epoch-3   epoch-4
    1x128          0.696685  0.249228  0.373368  0.374404
    4x32           0.696685  0.249228  0.373368  0.374404
    16x8           0.696685  0.249228  0.373368  0.374404
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import rgd_ext

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs
images, digits = map(torch.tensor, load_digits(return_X_y=True))
images, digits = images[:1792].float() / 8 - 1, digits[:1792]  # whole batches


def train(size: int, accumulate: int) -> list[str]:
    """The loss on all data after each epoch in steps of `accumulate` micro-batches of `size` samples."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, loader = accelerator.prepare(model, DataLoader(TensorDataset(images, digits), size))
    optimizer = accelerator.prepare(rgd_ext.RGD(model, lr=0.1, momentum=0.9))
    handle = rgd_ext.handle_of(model)
    handle.defer()  # backwards only collect
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    handle.write()  # the direction, before it is clipped
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            losses.append(f"{cross_entropy(model(images), digits):>9.6f}")
    return losses


print("micro-batches", *(f"{f'epoch-{epoch}':>9}" for epoch in range(1, epochs + 1)))
for size, accumulate in (128, 1), (32, 4), (8, 16):
    print(f"{f'{accumulate}x{size}':<13}", *train(size, accumulate))
