"""The diffusion matrix D of a batch or a data set, eqs. (2) and (3), as an operator that is never formed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

from torch import Tensor, nn

from .. import ops
from ..gradients import PerSampleGradients
from .batch_gradients import batch_gradients
from .per_sample_loss import Criterion, PerSampleLoss
from .products import DiffusionOperator
from .sources import Source, source_of
from .spectrum import Estimate, Spectrum
from .stream import Stream

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class DiffusionMatrix:
    """D = 1/(N - correction) sum_i (g_i - g)(g_i - g)^T, d x d, for N per-sample gradients g_i with mean g.

    With correction=0 this is eq. (2), and equally eq. (3): (1/N) sum_i g_i g_i^T - g g^T
    = (1/N^2) sum_{i<j} (g_i - g_j)(g_i - g_j)^T. D is symmetric and positive semi-definite, and its rank is at most
    min(N - 1, d).

    D is exactly zero where all g_i agree to rounding. Tensors are centred before anything else, so that they agree only
    where they are the same. Other sources may know |g_i - g|^2 only as a difference of products <g_i, g_j>. Their
    gradients agree where tr D is at most 8 ulps of the largest |g_i|^2. For a model in float32 this means that they
    differ by less than about a thousandth of their length (two thousandths on a GPU, and 4e-8 after `model.double()`).

    A vector is a tensor (d,) or a list with one tensor per parameter; k vectors are a tensor (d, k). Products have the
    form, dtype and device of the vectors. The d entries are those of the trainable parameters in the order of
    `model.parameters()`. All other results are float64, in which sums over batches are accumulated, too.

    Args:
        grads: a (N, d) tensor or a sequence of (N, *shape) tensors, of which centred copies are kept, or any
            `PerSampleGradients`. For models see `from_batch` and `from_dataset`.
        correction: as in `torch.var`; 1 gives the unbiased estimate of the covariance the samples were drawn with.

    Raises:
        ValueError, TypeError: for bad gradients (see `rgd_ext.ops.moments`), or if `correction` is not in [0, N).

    Example:
        >>> grads = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 0.0]])
        >>> D = rgd_ext.DiffusionMatrix(grads)
        >>> D @ torch.tensor([1.0, 3.0])
        tensor([0., 8.])
        >>> D.rank(), round(D.trace().item(), 4), round(D.largest_eigenvalue().item(), 4)
        (1, 2.6667, 2.6667)
    """

    def __init__(self, grads: ops.Tensors | PerSampleGradients | Source, *, correction: float = 0) -> None:
        if not isinstance(correction, (int, float)) or not correction >= 0:
            raise ValueError(f"correction is {correction!r}: pass a number of at least 0, as in torch.var")
        self._operator = DiffusionOperator(source_of(grads), correction)
        self._spectrum = Spectrum(self._operator)

    @classmethod
    def from_batch(
        cls, model: nn.Module, loss_fn: Criterion, x: object, y: object, *, correction: float = 0
    ) -> DiffusionMatrix:
        """D of the per-sample losses f_i = loss_fn(model(x_i), y_i) of one batch, by one forward and backward.

        The model, its `.grad`, its capture (`RGD`, `precondition`) and the random number generators are left as they
        were. In training mode, D is that of one draw of the dropout masks. The object keeps the activations that the
        backward needed. The batch is verified as by `rgd_ext.verify`, so that a model that couples the samples is
        refused.

        Args:
            model: as `rgd_ext.precondition` takes it.
            loss_fn: (output, y) -> the mean or the sum of the f_i, or all of them, (B,); which of these it returns is
                detected by a comparison with the losses of single samples.
            x: the argument of the model; a tuple or list of its arguments; or a mapping of its keyword arguments.
            y: whatever `loss_fn` takes. Tensors in `x` and `y` are moved to the device of the model.
            correction: as for the class.

        Raises:
            ValueError: if the loss is not per-sample (weights with a mean, ignore_index, contrastive losses) or not
                finite, if the model cannot be captured or couples the samples, or for a bad `correction`.
            TypeError: if `model` is not a module, or `loss_fn` returns no tensor.
            RuntimeError: if the model's capture is paused.

        Example:
            >>> model, y = torch.nn.Linear(4, 3), torch.tensor([0, 2, 1, 0, 1])
            >>> D = rgd_ext.DiffusionMatrix.from_batch(model, torch.nn.CrossEntropyLoss(), torch.randn(5, 4), y)
            >>> D.shape, D.rank()
            ((15, 15), 4)
        """
        with batch_gradients(model, PerSampleLoss(loss_fn)) as evaluate:
            _, grads = evaluate(x, y)
        return cls(grads, correction=correction)

    @classmethod
    def from_dataset(
        cls,
        model: nn.Module,
        loss_fn: Criterion,
        loader: Iterable[object],
        *,
        correction: float = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> DiffusionMatrix:
        """D of the per-sample losses of a data set, by passes over `loader` in constant memory.

        Nothing is computed until the first result is asked for. The first pass gives g and tr D; each product with a
        vector, or with k of them at once, takes one more pass. Losses and gradients are those of `from_batch`, and the
        model is verified on batches of the first pass.

        Args:
            model: in evaluation mode; its weights must not change as long as this object is in use.
            loss_fn: as for `from_batch`.
            loader: a DataLoader with shuffle=False, a list or any other iterable that gives the same pairs (x, y) in
                every pass. Batches may differ in size.
            correction: as for the class.
            checkpoint: a folder, made if missing, in which the results of finished passes are saved and, every minute,
                the state of the current pass. A new object with the same folder, model and data continues there. First
                it reads all data of the saved passes once, without the model, to compare the tensors, numbers and text
                in each batch, and compares the loss of the first batch. Delete the folder when you are done: a product
                takes 8 d bytes.
            progress: whether to show a bar for each pass on standard error (needs rich).

        Raises:
            ValueError, TypeError: for a model in training mode, an iterator, or a checkpoint of another model. The
                first result raises what `from_batch` raises, and ValueError for an empty loader, a checkpoint of other
                data or a damaged file in it.
            RuntimeError: in later passes, if batches, weights or losses differ from those of the first.

        Example:
            >>> model, y = torch.nn.Linear(4, 3).eval(), torch.tensor([0, 2, 1, 0, 1])
            >>> data = torch.utils.data.TensorDataset(torch.randn(5, 4), y)
            >>> loader = torch.utils.data.DataLoader(data, batch_size=2)
            >>> D = rgd_ext.DiffusionMatrix.from_dataset(model, torch.nn.CrossEntropyLoss(), loader)
            >>> D.spectrum(2).shape
            torch.Size([2])
        """
        return cls(Stream(model, loss_fn, loader, checkpoint, progress), correction=correction)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return self._operator.space.dimension, self._operator.space.dimension

    @property
    def num_samples(self) -> int:
        """N; takes the first pass over a data set."""
        return self._operator.num_samples

    def __repr__(self) -> str:
        return f"DiffusionMatrix(shape={self.shape}, correction={self._operator.correction})"

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, vectors: Sequence[Tensor]) -> list[Tensor]: ...

    def __matmul__(self, vectors: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """D v = 1/(N - correction) sum_i <g_i - g, v> (g_i - g).

        Args:
            vectors: (d,), (d, k), or one tensor (*shape) per parameter.

        Raises:
            ValueError, TypeError: for other shapes, or values that are no real floating-point tensors.
        """
        return self._operator.apply(vectors)

    def quadratic_form(self, vectors: Tensor | Sequence[Tensor]) -> Tensor:
        """v^T D v = 1/(N - correction) sum_i <g_i - g, v>^2, which is at least 0: a scalar, or (k,) for (d, k).

        Raises:
            ValueError, TypeError: as for `D @ v`.
        """
        forms = self._operator.quadratic_forms(self._operator.space.rows(vectors))
        return forms if isinstance(vectors, Tensor) and vectors.ndim == 2 else forms[0]

    def trace(self) -> Tensor:
        """tr D = 1/(N - correction) sum_i |g_i - g|^2."""
        return self._operator.trace()

    def largest_eigenvalue(self) -> Tensor:
        """lambda_max(D), the number that bounds epsilon in eq. (6)."""
        return self.spectrum(1)[0]

    def spectrum(self, k: int | None = None) -> Tensor:
        """The k largest eigenvalues of D, descending.

        They are exact where min(N, d) is at most 4096; for a data set, where d or sqrt(N d) is, since then its
        gradients take at most 128 MiB. Beyond that ARPACK iterates on `D @ v`, until the residuals are at most 1e-10
        lambda_max (1e-5 for float32 gradients); see `estimate`.

        Args:
            k: at most d; or None for all min(N - 1, d) eigenvalues that can be positive.

        Returns:
            (k,).

        Raises:
            ValueError: if `k` is out of range, or if it is None or d where only ARPACK serves.
            scipy.sparse.linalg.ArpackNoConvergence: if it does not converge.
        """
        return self._spectrum.largest(k)

    def rank(self) -> int:
        """The number of eigenvalues of D above the rounding of its entries, at most min(N - 1, d).

        Raises:
            RuntimeError: where `spectrum` is not exact; the message names the bound.
        """
        return self._spectrum.rank()

    def to_dense(self) -> Tensor:
        """D as a tensor (d, d), exactly symmetric.

        Raises:
            ValueError: if it would take more than 2 GiB.
        """
        return self._operator.dense()

    def linear_operator(self) -> LinearOperator:
        """D as a symmetric `scipy.sparse.linalg.LinearOperator` on float64 arrays.

        Its `matmat` computes the products of all columns in one pass.
        """
        return self._operator.linear_operator()

    def estimate(self, k: int | None = None) -> Estimate:
        """The passes, time and memory that `spectrum(k)` will take, from a measurement of one batch.

        Before the first pass over a data set, N is taken to be large. Passes that a checkpoint saves are counted, too.

        Raises:
            ValueError: as `spectrum`.
            TypeError: if the loader does not know its length.
        """
        return self._spectrum.estimate(k)
