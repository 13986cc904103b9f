"""Rank training samples by how wrong their labels look: by loss, by margin, and by per-sample gradients.

40 % of the labels are replaced by wrong ones. An MLP is trained on them while `handle.record` keeps, for every sample
of an epoch, the norm of its gradient and the inner products with the gradient of its batch and with that of a small
validation set whose labels are right. The larger a score, the more suspicious the label. The table has the area under
the ROC curve (AUROC) of each: the probability that a wrong label gets a larger score than a right one.

The data are scikit-learn's digits, or Fashion-MNIST from a folder with the four files of its authors, which Debian's
package dataset-fashion-mnist installs. The program needs scikit-learn.
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

import rgd_ext

WRONG, VALIDATION, BATCH_SIZE, LR = 0.4, 200, 100, 0.05


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 64) in [-1, 1] and labels (N,)."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    return images.float() / 8 - 1, labels


def fashion_mnist(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 784) in [-1, 1] and labels (N,)."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return torch.tensor(images).view(-1, 784) / 127.5 - 1, torch.tensor(labels).long()


def scores(rows: np.ndarray, losses: torch.Tensor, margins: torch.Tensor) -> dict[str, np.ndarray]:
    """Scores that are larger where a label looks wrong, (N,) each, by name.

    Args:
        rows: what `handle.record` wrote in one epoch.
        losses, margins: of the samples in the same steps.
    """
    norms, grad_norms = rows["sample_norms"].clip(min=1e-12), rows["grad_norm"].clip(min=1e-12)
    products = rows["alignments"] + rows["grad_norm"] ** 2  # <g_i, g>
    return {
        "loss": losses.numpy(),
        "margin": -margins.numpy(),
        "gradient-norm": norms,
        "batch-cosine": -products / norms / grad_norms,
        "validation-cosine": -rows["aligned"] / norms,
    }


def with_wrong_labels(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of which some were replaced by another class, and which ones those are, (N,) each."""
    wrong = torch.rand(len(y)) < WRONG
    return torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y), wrong


def train(x: torch.Tensor, y: torch.Tensor, validation: list[torch.Tensor], epochs: int, folder: str) -> list[dict]:
    """The scores of every epoch of a training on images (N, ...) and labels (N,)."""
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    found = []
    with rgd_ext.observe(model) as handle:
        for epoch in range(epochs):
            path, losses, margins = f"{folder}/epoch{epoch}.npy", torch.zeros(len(x)), torch.zeros(len(x))
            handle.record_to(path, size=len(x))
            for index in torch.randperm(len(x)).split(BATCH_SIZE):
                with handle.paused():
                    loss = cross_entropy(model(validation[0]), validation[1])
                    handle.align(torch.autograd.grad(loss, [*model.parameters()]))
                optimizer.zero_grad()
                output, labels = model(x[index]), y[index]
                loss = cross_entropy(output, labels, reduction="none")
                loss.mean().backward()
                handle.record(index)
                optimizer.step()
                losses[index], margins[index] = loss.detach(), margin(output.detach(), labels[:, None])
            found.append(scores(np.load(path), losses, margins))
    return found


def margin(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logit of the label less the largest other one, (B,), for logits (B, 10) and labels (B, 1)."""
    return output.gather(1, labels)[:, 0] - output.scatter(1, labels, -torch.inf).max(1).values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="in place of scikit-learn's digits")
    options = parser.parse_args()
    if options.fashion_mnist and not any(options.fashion_mnist.glob("train-*-ubyte.gz")):
        parser.error(f"there are no train-*-ubyte.gz in {options.fashion_mnist}: name the folder of the four files")
    x, y = fashion_mnist(options.fashion_mnist) if options.fashion_mnist else digits()
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    labels, wrong = with_wrong_labels(y[VALIDATION:])
    with tempfile.TemporaryDirectory() as folder:
        by_epoch = train(x[VALIDATION:], labels, [x[:VALIDATION], y[:VALIDATION]], options.epochs, folder)
    print(f"{'AUROC of':<20}{'first epoch':>13}{'last epoch':>13}{'sum of all':>13}")
    for name in by_epoch[0]:
        values = [scores_of_epoch[name] for scores_of_epoch in by_epoch]
        areas = [roc_auc_score(wrong, value) for value in (values[0], values[-1], sum(values))]
        print(f"{name:<20}" + "".join(f"{area:>13.1%}" for area in areas))
