"""Instance-wise UPGrad: a small MLP on handwritten digits, with TorchJD's weights for the per-sample gradients g_i.

A step along the mean gradient increases the losses of samples whose gradients conflict with it. UPGrad projects each
g_i onto the cone of directions that increase none, and takes the mean of the projections, which is also longer than the
mean gradient. Both runs count increases of more than 0.001, to first order, from the Gramian, without which the mean
would take less time. It needs scikit-learn and torchjd[quadprog-projector].
"""

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torchjd.aggregation import MeanWeighting, UPGradWeighting, Weighting
from torchjd.linalg import QuadprogProjector

import rgd_ext

BATCH_SIZE, LR, INCREASE = 32, 0.05, 0.001


def digits() -> tuple[torch.Tensor, ...]:
    """Images (N, 64) and labels (N,) to train on, then those to test with."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 8 - 1
    return images[:-500], labels[:-500], images[-500:], labels[-500:]


def counting(weighting: Weighting, shares: list[float]) -> rgd_ext.weights.FromGramian:
    """The rule by `weighting`; it appends the share of samples whose losses a step along its direction increases."""

    def weights_of(gram: torch.Tensor) -> torch.Tensor:
        weights = weighting(gram)
        changes = -LR * (gram @ weights)  # -lr <g_i, direction>
        shares.append((changes > INCREASE).float().mean().item())
        return weights

    return rgd_ext.weights.FromGramian(weights_of)


def train(weighting: Weighting, steps: int) -> tuple[float, float, float]:
    """Test accuracy, milliseconds of a step (median), and the mean share of samples whose losses a step increases."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    shares, milliseconds = [], []
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with rgd_ext.precondition(model, weights=counting(weighting, shares)):
        for batch in torch.randint(len(x), (steps, BATCH_SIZE)):
            begin = time.perf_counter()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()  # the direction is in .grad
            optimizer.step()
            milliseconds.append(1e3 * (time.perf_counter() - begin))
    accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    return accuracy, statistics.median(milliseconds), statistics.mean(shares)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # the tensors are too small for a second one
    # By default TorchJD regularises the projection more, and small increases are then left.
    projector = QuadprogProjector(norm_eps=0, reg_eps=1e-6)
    print(f"{'direction':<10}{'test accuracy':>15}{'ms per step':>13}{'losses increased':>18}")
    for name, weighting in {"mean": MeanWeighting(), "UPGrad": UPGradWeighting(projector=projector)}.items():
        print("{:<10}{:>15.1%}{:>13.2f}{:>18.2%}".format(name, *train(weighting, steps)))
