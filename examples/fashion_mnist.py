"""A convolutional network on Fashion-MNIST along the RGD direction, in a plain loop.

    python examples/fashion_mnist.py FOLDER

FOLDER has the four files, such as train-images-idx3-ubyte.gz. It prints training loss and test accuracy, the mean angle
between direction and gradient in degrees, the mean effective sample size, and the gradient noise scale:

    epoch       loss  accuracy     angle   samples     noise
    1         0.5445     82.5%      12.5     126.6        88
    2         0.3859     86.1%      12.8     126.7       136
    3         0.3468     87.6%      12.5     126.9       180
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rgd_ext


def read(folder: Path, part: str) -> TensorDataset:
    """Images (N, 1, height, width) in [-1, 1] and labels (N,)."""
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    count, height, width = np.frombuffer(images, ">i4", 3, offset=4)
    pixels = torch.tensor(np.frombuffer(images, np.uint8, offset=16)).view(count, 1, height, width)
    return TensorDataset(pixels / 127.5 - 1, torch.tensor(np.frombuffer(labels, np.uint8, offset=8)).long())


parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--epochs", type=int, default=3)
options = parser.parse_args()
train, (x_test, y_test) = read(options.folder, "train"), read(options.folder, "t10k").tensors
torch.manual_seed(0)
first = nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()
second = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()
model = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
criterion, loader = nn.CrossEntropyLoss(), DataLoader(train, batch_size=128, shuffle=True)
optimizer = rgd_ext.RGD(model, lr=0.05, momentum=0.9, epsilon=rgd_ext.Spectral(0.5))
print("epoch       loss  accuracy     angle   samples     noise")
for epoch in range(1, options.epochs + 1):
    sums = torch.zeros(5)
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()  # the direction is in .grad
        optimizer.step()
        stats = optimizer.preconditioner.stats
        angle, signal = stats.cosine.clamp(max=1).acos().rad2deg(), stats.unbiased_squared_grad_norm
        sums += torch.stack([loss.detach(), angle, stats.effective_sample_size, stats.unbiased_trace, signal])
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    loss, angle, samples, trace, signal = sums / len(loader)
    print(f"{epoch:<6}{loss:>10.4f}{accuracy:>10.1%}{angle:>10.1f}{samples:>10.1f}{trace / signal:>10.0f}")
