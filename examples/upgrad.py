"""TorchJD: instance-wise UPGrad, a weighting of the per-sample gradients, on handwritten digits.

    python examples/upgrad.py     # needs scikit-learn and torchjd[quadprog-projector]

A step along the mean gradient increases the losses of samples whose gradients conflict with it. UPGrad projects each
g_i onto the cone of directions that increase none, and takes the mean of the projections, which is also longer than the
mean gradient. Both runs count increases of more than 0.001, to first order, from the Gramian, without which the mean
would take less time. It prints:

    direction   test accuracy  ms per step  losses increased
    mean                88.8%         0.70            21.99%
    UPGrad              89.6%         4.07             0.00%
"""

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torchjd.aggregation import MeanWeighting, UPGradWeighting, Weighting
from torchjd.linalg import QuadprogProjector

import rgd_ext

LR, INCREASE = 0.05, 0.001


def counting(weighting: Weighting, shares: list[float]) -> rgd_ext.weights.FromGramian:
    """The rule by `weighting`; it appends the share of samples whose losses a step along its direction increases."""

    def weights_of(gram: torch.Tensor) -> torch.Tensor:
        weights = weighting(gram)
        shares.append((-LR * (gram @ weights) > INCREASE).float().mean().item())  # -lr <g_i, direction>
        return weights

    return rgd_ext.weights.FromGramian(weights_of)


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps
torch.set_num_threads(1)  # the tensors are too small for a second one
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1
projector = QuadprogProjector(norm_eps=0, reg_eps=1e-6)  # by default it regularises more, and small increases are left
print(f"{'direction':<10}{'test accuracy':>15}{'ms per step':>13}{'losses increased':>18}")
for name, weighting in {"mean": MeanWeighting(), "UPGrad": UPGradWeighting(projector=projector)}.items():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer, shares, times = torch.optim.SGD(model.parameters(), LR), [], []
    with rgd_ext.precondition(model, weights=counting(weighting, shares)):
        for batch in torch.randint(len(images) - 500, (steps, 32)):
            begin = time.perf_counter()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - begin))
    accuracy = (model(images[-500:]).argmax(1) == labels[-500:]).float().mean()
    print(f"{name:<10}{accuracy:>15.1%}{statistics.median(times):>13.2f}{statistics.mean(shares):>18.2%}")
