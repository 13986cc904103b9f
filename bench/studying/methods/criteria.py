"""What the methods minimise: the mean of the samples' losses, with other losses or other weights.

A criterion takes outputs (B, classes) and labels (B,), and returns a scalar. A function here returns one, given the
numbers of training samples of the classes, (classes,), of which most criteria make no use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]
Choice = Callable[[Tensor], Criterion]


def cross_entropy(_: Tensor) -> Criterion:
    """The mean of the cross entropies."""
    return F.cross_entropy


def class_weights(counts: Tensor) -> Criterion:
    """Each sample has a weight in inverse proportion to its class, and the batch's weights sum to one."""
    weights = 1 / counts.double()  # infinite for classes that no sample has
    return lambda outputs, labels: F.cross_entropy(outputs, labels, weights.to(outputs.dtype))


def label_smoothing(share: float) -> Choice:
    """`share` of each label is spread over all classes (C. Szegedy et al., 2016, arXiv 1512.00567)."""
    return lambda _: partial(F.cross_entropy, label_smoothing=share)


def focal(gamma: float) -> Choice:
    """(1 - p)^gamma times the cross entropy, -log p (T.-Y. Lin et al., 2017, arXiv 1708.02002)."""
    return lambda _: partial(_focal_loss, gamma=gamma)


def truncated(share: float) -> Choice:
    """The mean without the largest losses of the batch, `share` of them.

    Iterative trimmed loss minimisation (Y. Shen and S. Sanghavi, 2019, arXiv 1810.11874), by batches.
    """
    return lambda _: partial(_trimmed_mean, share=share)


def reweighted(tau: float) -> Choice:
    """Each loss l has the weight exp(min(l, tau) / (tau + 1)), which is taken as constant.

    Re-weighted gradient descent (R. Kumar et al., 2024, arXiv 2306.09222). Like there, the weights are not divided by
    their sum, so that the gradient is longer than that of the mean loss, by up to a factor of e.
    """
    return lambda _: partial(_reweighted_mean, tau=tau)


def _focal_loss(outputs: Tensor, labels: Tensor, gamma: float) -> Tensor:
    losses = F.cross_entropy(outputs, labels, reduction="none")
    wrong = -(-losses).expm1()  # 1 - p, without cancellation where p is near 1
    return (wrong.pow(gamma) * losses).mean()


def _trimmed_mean(outputs: Tensor, labels: Tensor, share: float) -> Tensor:
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses.topk(len(losses) - round(share * len(losses)), largest=False).values.mean()


def _reweighted_mean(outputs: Tensor, labels: Tensor, tau: float) -> Tensor:
    losses = F.cross_entropy(outputs, labels, reduction="none")
    weights = (losses.detach().clamp(max=tau) / (tau + 1)).exp()
    return (weights * losses).mean()
