"""The mean of the per-sample losses of an ordinary criterion, whichever reduction it applies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# (output, y) -> a scalar, or one loss per sample; what the model returns and the loader gives is the user's.
Criterion: TypeAlias = Callable[[Any, Any], Tensor]


class PerSampleLoss:
    """f = mean_i f_i with f_i = loss_fn(output_i, y_i), where `loss_fn` returns the mean, the sum or all of the f_i.

    Which of these it returns is detected: the loss of a batch is compared with the losses of its samples.

    Args:
        loss_fn: (output, y) -> a scalar, or one loss per sample, (B,).

    Attributes:
        is_trusted: whether the losses of batches are no longer compared with those of single samples.
    """

    def __init__(self, loss_fn: Criterion) -> None:
        self.loss_fn = loss_fn
        self.is_trusted = False
        self._reduction: str | None = None

    def __call__(self, output: object, y: object, batch_size: int) -> Tensor:
        """The mean of the losses of `batch_size` samples, with its graph.

        Raises:
            ValueError: if it is not finite, or if the loss of the batch does not come from losses of its samples.
            TypeError: if `loss_fn` returns no tensor.
        """
        loss = self._evaluated(output, y)
        if loss.ndim and loss.shape != (batch_size,):
            raise ValueError(
                f"loss_fn returned shape {tuple(loss.shape)} for {batch_size} samples: return a scalar, or one loss per"
                f" sample, ({batch_size},)"
            )
        if not loss.isfinite().all():
            raise ValueError(
                "the loss of a batch is not finite, nor would its gradients be: look at its data and weights"
            )
        if not self.is_trusted or self._reduction is None:
            self._find_reduction(loss.detach(), output, y, batch_size)
        return loss / batch_size if self._reduction == "sum" and not loss.ndim else loss.mean()

    def trust(self) -> None:
        """Skip the comparison from now on, since all batches of the data set have passed it."""
        self.is_trusted = True

    def _evaluated(self, output: object, y: object) -> Tensor:
        loss = self.loss_fn(output, y)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn returned a {type(loss).__name__}: return a tensor")
        return loss

    @torch.no_grad()
    def _find_reduction(self, loss: Tensor, output: object, y: object, batch_size: int) -> None:
        """Detect the reduction of `loss_fn` from the loss of the batch and the losses of its samples."""
        leading = [tuple(t.shape) for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if not any(shape[:1] == (batch_size,) for shape in leading):
            raise ValueError(
                f"the model returned {leading} for {batch_size} samples: they must lie along dimension 0 of its output;"
                " reshape in loss_fn rather than in the model"
            )
        losses = [self._evaluated(_sample(output, i, batch_size), _sample(y, i, batch_size)) for i in range(batch_size)]
        if any(value.numel() != 1 for value in losses):
            raise ValueError(
                f"not a per-sample loss: loss_fn returned shape {tuple(losses[0].shape)} for a single sample; return a"
                " scalar, or one loss per sample"
            )
        single = torch.stack([value.reshape(()) for value in losses])
        expected = {"none": single} if loss.ndim else {"mean": single.mean(), "sum": single.sum()}
        tolerance = torch.finfo(loss.dtype).eps ** 0.5 * single.abs().mean()
        found = [name for name, value in expected.items() if ((loss - value).abs() <= tolerance).all()]
        if not found or self._reduction not in (None, *found):
            raise ValueError(
                f"not a per-sample loss: loss_fn gives {loss.mean().item():.6g} for {batch_size} samples whose"
                f" mean is {single.mean().item():.6g} one by one. Weights, ignore_index or a contrast between samples"
                " couple them; take a loss of each sample alone, with reduction='sum' or 'none'"
            )
        # For one sample, or where all losses are zero, the mean equals the sum, and a later batch has to tell.
        if len(found) == 1:
            self._reduction = found[0]


def _sample(tree: object, index: int, batch_size: int) -> object:
    """Sample `index` as a batch of one: of each tensor, and of each list with one value per sample, in a nest.

    Leaves without a dimension of `batch_size` samples are shared by all samples, and are kept.
    """

    def is_batch(node: object) -> bool:
        if not isinstance(node, (list, tuple)) or len(node) != batch_size:
            return False
        return not any(isinstance(t, Tensor) and t.shape[:1] == (batch_size,) for t in pytree.tree_leaves(node))

    def taken(leaf: Any) -> object:
        if is_batch(leaf) or (isinstance(leaf, Tensor) and leaf.shape[:1] == (batch_size,)):
            return leaf[index : index + 1]
        return leaf

    return pytree.tree_map(taken, tree, is_leaf=is_batch)
