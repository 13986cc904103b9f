"""Rank training samples by how wrong their labels look: by loss, by margin, and by per-sample gradients.

40 % of the labels are replaced by wrong ones. An MLP is trained on them while `handle.record` keeps, for every sample
of an epoch, the norm of its gradient and the inner products with the gradient of its batch and with that of a small
validation set whose labels are right. The table has the area under the ROC curve (AUROC) of each score: the probability
that a wrong label looks worse than a right one, 50 % for a coin. It needs scikit-learn; Fashion-MNIST is read from a
folder with its four files, such as the one of Debian's package dataset-fashion-mnist.
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
    """What grows with the suspicion that a label is wrong, (N,) each.

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


def train(x: torch.Tensor, y: torch.Tensor, epochs: int, folder: str) -> tuple[torch.Tensor, list[dict]]:
    """Which labels were replaced, (N,), and the scores of every epoch."""
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    validation, training = order[:VALIDATION], order[VALIDATION:]
    x_validation, y_validation, x, y = x[validation], y[validation], x[training], y[training]
    wrong = torch.rand(len(x)) < WRONG
    y = torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y)

    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    losses, margins, found = torch.zeros(len(x)), torch.zeros(len(x)), []
    with rgd_ext.observe(model) as handle:
        for epoch in range(epochs):
            path = f"{folder}/epoch{epoch}.npy"
            handle.record_to(path, size=len(x))
            for index in torch.randperm(len(x)).split(BATCH_SIZE):
                with handle.paused():
                    loss = cross_entropy(model(x_validation), y_validation)
                    handle.align(torch.autograd.grad(loss, [*model.parameters()]))
                optimizer.zero_grad()
                output, given = model(x[index]), y[index][:, None]
                loss = cross_entropy(output, y[index], reduction="none")
                loss.mean().backward()
                handle.record(index)
                optimizer.step()
                losses[index], output = loss.detach(), output.detach()
                others = output.scatter(1, given, -torch.inf).max(1).values
                margins[index] = output.gather(1, given)[:, 0] - others
            found.append(scores(np.load(path), losses.clone(), margins.clone()))
    return wrong, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="in place of scikit-learn's digits")
    options = parser.parse_args()
    x, y = fashion_mnist(options.fashion_mnist) if options.fashion_mnist else digits()
    with tempfile.TemporaryDirectory() as folder:
        wrong, epochs = train(x, y, options.epochs, folder)
    print(f"{'AUROC of':<20}{'first epoch':>13}{'last epoch':>13}{'sum of all':>13}")
    for name in epochs[0]:
        values = [epoch[name] for epoch in epochs]
        areas = [roc_auc_score(wrong, value) for value in (values[0], values[-1], sum(values))]
        print(f"{name:<20}" + "".join(f"{area:>13.1%}" for area in areas))
