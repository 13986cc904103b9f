"""The diffusion matrix D of a batch or a data set, eqs. (2) and (3), as an operator that is never formed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import ops, reference
from .batch_gradients import batch_gradients
from .checkpoint import fingerprint
from .gradients import DenseGradients, PerSampleGradients
from .metric import rounding, statistics
from .per_sample_loss import PerSampleLoss
from .reference import accumulate_dtype
from .streaming import Held, State, Stream

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# For all eigenvalues, matrices of up to this order squared elements are formed.
_EXACT = 4096
# The largest dense D, in bytes.
_DENSE_BYTES = 2**31


class Estimate(NamedTuple):
    """What a spectrum will take.

    Attributes:
        passes: over the samples, a rough guess where ARPACK iterates: up to twice as many, or more, where eigenvalues
            are close.
        seconds: for these passes, from the time of one batch.
        bytes: of memory, besides the model and the per-sample gradients of one batch.
    """

    passes: int
    seconds: float
    bytes: int


class DiffusionMatrix:
    """D = 1/(N - correction) sum_i (g_i - g)(g_i - g)^T, d x d, for N per-sample gradients g_i with mean g.

    With correction=0 this is eq. (2), and equally eq. (3): (1/N) sum_i g_i g_i^T - g g^T
    = (1/N^2) sum_{i<j} (g_i - g_j)(g_i - g_j)^T. D is symmetric and positive semi-definite, and its rank is at most
    min(N - 1, d).

    It is exactly zero where all g_i agree to rounding. Tensors are centred before anything else: they agree where they
    are the same. Of other sources |g_i - g|^2 may be known only as a difference of products <g_i, g_j>: they agree
    where tr D is at most 8 ulps of the largest |g_i|^2, that is, of a model in float32, where they differ by less than
    about a thousandth of their length (two on a GPU, and 4e-8 after `model.double()`).

    Vectors are tensors (d,), (d, k) for k of them, or lists with one tensor per parameter; results have their form,
    dtype and device. d counts the trainable parameters in the order of `model.parameters()`. All other results are
    float64. Sums over batches are accumulated in float64.

    Args:
        grads: a (N, d) tensor, a sequence of (N, *shape) tensors, of which centred copies are kept, or any
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

    def __init__(self, grads: ops.Tensors | PerSampleGradients | Stream, *, correction: float = 0) -> None:
        if not isinstance(correction, (int, float)) or not correction >= 0:
            raise ValueError(f"correction is {correction!r}: pass a number of at least 0, as in torch.var")
        self._correction = correction
        self._held: PerSampleGradients | None = None
        if isinstance(grads, Stream):
            self._source: Held | Stream = grads
        else:
            self._held = grads if isinstance(grads, PerSampleGradients) else DenseGradients(_deviations(grads))
            self._source = Held(self._held)
            self._check_correction(self._held.batch_size)
        self._dim = sum(t.numel() for t in self._source.like)

    @classmethod
    def from_batch(
        cls, model: nn.Module, loss_fn: Callable, x: object, y: object, *, correction: float = 0
    ) -> DiffusionMatrix:
        """D of the per-sample losses f_i = loss_fn(model(x_i), y_i) of one batch, by one forward and backward.

        The model, its `.grad`, its capture (`RGD`, `precondition`) and the random number generators are left as they
        were. In training mode, dropout gives D for one draw of its masks. The object keeps what the backward needed of
        the activations. The batch is verified as `rgd_ext.verify` does it, so that a model that couples the samples is
        refused.

        Args:
            model: as `rgd_ext.precondition` takes it.
            loss_fn: (output, y) -> the mean or the sum of the f_i, or all of them, (B,); which one is found out from
                single samples.
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
        loss_fn: Callable,
        loader: Iterable,
        *,
        correction: float = 0,
        checkpoint: str | os.PathLike | None = None,
        progress: bool = False,
    ) -> DiffusionMatrix:
        """D of the per-sample losses of a data set, in passes over `loader` of constant memory.

        Nothing is computed yet. The first pass gives g and tr D; each product with a vector, or with k of them at once,
        is then one more pass. Samples are as in `from_batch`; the first batch shows whether the model couples them.

        Args:
            model: in evaluation mode; its weights must not change as long as this object is in use.
            loss_fn: as for `from_batch`.
            loader: a DataLoader with shuffle=False, a list or any other iterable that gives the same pairs (x, y) in
                every pass. Batches may differ in size.
            correction: as for the class.
            checkpoint: a folder, made if missing, for finished products and, every minute, the state of the pass under
                way. With the same folder, model and data a new object continues there, after it has read all data of
                the folder's passes once, without the model, to compare the tensors, numbers and text in each batch; of
                `loss_fn`, it compares the value on the first batch. Delete it when you are done: a product takes 8 d
                bytes.
            progress: a bar for each pass on standard error (needs rich).

        Raises:
            ValueError, TypeError: for a model in training mode, an iterator, or a checkpoint of another model; and with
                the first result as `from_batch`, or for an empty loader, or a checkpoint of other data or with a
                damaged file.
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
        return self._dim, self._dim

    @property
    def num_samples(self) -> int:
        """N; takes the first pass over a data set."""
        return int(self._moments["count"]) if self._held is None else self._held.batch_size

    def __repr__(self) -> str:
        return f"DiffusionMatrix(shape={self.shape}, correction={self._correction})"

    def __matmul__(self, vectors: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """D v = 1/(N - correction) sum_i <g_i - g, v> (g_i - g).

        Args:
            vectors: (d,), (d, k), or one tensor (*shape) per parameter.

        Raises:
            ValueError, TypeError: for other shapes, or values that are no real floating-point tensors.
        """
        product = self._products(self._rows(vectors))
        if isinstance(vectors, Tensor):
            return product.T.reshape(vectors.shape).to(vectors)
        return [part.to(v) for part, v in zip(self._split(product[0]), vectors, strict=True)]

    def quadratic_form(self, vectors: Tensor | Sequence[Tensor]) -> Tensor:
        """v^T D v = 1/(N - correction) sum_i <g_i - g, v>^2, at least 0: a scalar, or (k,) for (d, k).

        Raises:
            ValueError, TypeError: as for `D @ v`.
        """
        rows = self._rows(vectors)
        mean = self._moments["mean"]

        def step(state: State, grads: PerSampleGradients) -> None:
            for index, row in enumerate(rows):
                state["sum"][index] += self._centred(grads, row, mean).square().sum()

        total = rows.new_zeros(len(rows))
        if not self._is_zero:
            total = self._source.fold(f"form-{fingerprint(rows)}", {"sum": total}, step)["sum"] / self._denominator
        return total if isinstance(vectors, Tensor) and vectors.ndim == 2 else total[0]

    def trace(self) -> Tensor:
        """tr D = 1/(N - correction) sum_i |g_i - g|^2."""
        scatter = self._moments["scatter"]
        return torch.zeros_like(scatter) if self._is_zero else scatter / self._denominator

    def largest_eigenvalue(self) -> Tensor:
        """lambda_max(D), the number that bounds epsilon in eq. (6)."""
        return self.spectrum(1)[0]

    def spectrum(self, k: int | None = None) -> Tensor:
        """The k largest eigenvalues of D, descending.

        Exact where min(N, d) is at most 4096; of a data set, where d is, or sqrt(N d), since then its gradients take at
        most 128 MiB. Beyond that ARPACK iterates on `D @ v`, to residuals of 1e-10 lambda_max (1e-5 for float32
        gradients); see `estimate`.

        Args:
            k: at most d. None for all that can be positive, min(N - 1, d) of them.

        Returns:
            (k,).

        Raises:
            ValueError: if `k` is out of range, or if it is None or d where only ARPACK serves.
            scipy.sparse.linalg.ArpackNoConvergence: if it does not converge.
        """
        self._check_number(k)
        values = self._eigenvalues
        if values is None:
            self._check_number(k)  # now that N is known
            values = self._iterate(min(k, self._rank_bound))
        if k is None:
            return values
        return torch.nn.functional.pad(values[:k], (0, max(0, k - len(values))))

    def rank(self) -> int:
        """The number of eigenvalues of D above the rounding of its entries, at most min(N - 1, d).

        Raises:
            RuntimeError: where `spectrum` is not exact, naming the bound.
        """
        values = self._eigenvalues
        if values is None:
            raise RuntimeError(
                f"rank needs all eigenvalues of D, too many to compute: the rank is at most min(N - 1, d) ="
                f" {self._rank_bound}; {self._instead}"
            )
        if len(values) == 0:
            return 0
        return int(reference.rank(values, min(self.num_samples, self._dim), self._moments["largest"], self._ulp))

    def to_dense(self) -> Tensor:
        """D as a tensor (d, d), exactly symmetric.

        Raises:
            ValueError: if it would take more than 2 GiB.
        """
        size = 8 * self._dim**2
        if size > _DENSE_BYTES:
            raise ValueError(
                f"a dense D of d = {self._dim} takes {size} bytes ({size / 2**30:.1f} GiB): use D @ v, spectrum(k) or"
                " linear_operator(), which never form it"
            )
        mean = self._moments["mean"]
        total = mean.new_zeros(self.shape)
        if self._is_zero:
            return total

        def step(state: State, grads: PerSampleGradients) -> None:
            centred = _matrix(grads, self._source.like) - mean
            state["sum"].addmm_(centred.T, centred)

        total = self._source.fold("dense", {"sum": total}, step)["sum"]
        # Not every BLAS gives the two halves of a product the same bits.
        return (total + total.T) / (2 * self._denominator)

    def linear_operator(self) -> LinearOperator:
        """D as a symmetric `scipy.sparse.linalg.LinearOperator` on float64 arrays; `matmat` shares a pass."""
        from scipy.sparse.linalg import LinearOperator

        def product(array):
            return (self @ torch.from_numpy(array.astype("float64"))).numpy()

        products = {"matvec": product, "rmatvec": product, "matmat": product, "rmatmat": product}
        return LinearOperator(self.shape, dtype="float64", **products)

    def estimate(self, k: int | None = None) -> Estimate:
        """What `spectrum(k)` will take, measured on one batch. Finished passes of a checkpoint are not deducted.

        Before the first pass over a data set, N is taken to be large.

        Raises:
            ValueError: as `spectrum`.
            TypeError: if the loader does not know its length.
        """
        self._check_number(k)
        if k in (None, self._dim) or self._is_exact(self._known_samples):
            # The CPU kernel sums up to eight Gramians of a batch.
            matrices = 3 if self._held is None else 3 + 8
            passes, size = 2, matrices * 8 * min(self._elements(self._known_samples), _EXACT**2)
        else:
            basis = _basis(k, self._dim)
            passes, size = 1 + basis + (basis - k) // 2, 8 * self._dim * (basis + 4)
        row = torch.ones(self._dim, dtype=torch.float64, device=self._source.like[0].device)
        state = {"sum": torch.zeros_like(row)}

        def step(state: State, grads: PerSampleGradients) -> None:
            self._accumulate(state["sum"], grads, row, torch.zeros_like(row))

        return Estimate(passes, passes * self._source.seconds(state, step), size)

    @cached_property
    def _moments(self) -> State:
        """N, g, the sum of |g_i - g|^2 and the largest |g_i|^2."""
        device = self._source.like[0].device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        state = {"count": zero, "mean": zero.new_zeros(self._dim), "scatter": zero, "largest": zero}
        moments = self._source.fold("moments", {name: value.clone() for name, value in state.items()}, _merge)
        self._check_correction(int(moments["count"]))
        return moments

    def _check_correction(self, number: int) -> None:
        if number <= self._correction:
            raise ValueError(
                f"D of N = {number} samples with correction={self._correction} divides by {number - self._correction}:"
                " pass a smaller correction, or more samples"
            )

    @property
    def _denominator(self) -> float:
        return self.num_samples - self._correction

    @property
    def _ulp(self) -> float:
        like = self._source.like[0]
        return rounding(accumulate_dtype(like.dtype), like.device)

    @cached_property
    def _is_zero(self) -> bool:
        moments = self._moments
        return bool(moments["scatter"] <= 8 * self._ulp * moments["largest"] * moments["count"])

    @property
    def _rank_bound(self) -> int:
        return min(self.num_samples - 1, self._dim)

    @property
    def _known_samples(self) -> int | None:
        """N, or None before the first pass over a data set."""
        return self.num_samples if self._held is not None or "_moments" in vars(self) else None

    def _elements(self, samples: int | None) -> int:
        """Of the smallest matrix that gives all eigenvalues: D, the Gramian, or the gradients of a data set."""
        shorter = self._dim if samples is None else min(samples, self._dim)
        return shorter * (self._dim if self._held is None else shorter)

    def _is_exact(self, samples: int | None) -> bool:
        return self._elements(samples) <= _EXACT**2

    @property
    def _instead(self) -> str:
        """What to call where not all eigenvalues can be had."""
        text = "spectrum(k) with a small k, as in spectrum(10), shows how many matter"
        return text if self._held is not None else f"{text}, and from_batch takes up to {_EXACT} samples at once"

    def _check_number(self, k: int | None) -> None:
        """Raise ValueError if there are no k eigenvalues, or too many for ARPACK."""
        if k is not None and (not isinstance(k, int) or not 1 <= k <= self._dim):
            raise ValueError(f"k is {k!r}: pass a whole number from 1 to d = {self._dim}, or None for all eigenvalues")
        # A batch has at least one sample.
        samples = self._known_samples or self._source.length() or 1
        if k in (None, self._dim) and not self._is_exact(samples):
            raise ValueError(f"all eigenvalues of D, of d = {self._dim}, are too many to compute: {self._instead}")

    @cached_property
    def _eigenvalues(self) -> Tensor | None:
        """The min(N - 1, d) largest, descending, or None where no matrix that gives them is small."""
        bound = self._rank_bound
        if self._is_zero:
            return self._moments["mean"].new_zeros(bound)
        if not self._is_exact(self.num_samples):
            return None
        if self._dim <= self.num_samples:
            values = reference.eigenvalues(self.to_dense())
        elif self._held is None:
            centred = self._rows_of_all() - self._moments["mean"]
            values = reference.eigenvalues(centred @ centred.T) / self._denominator
        else:
            with torch.no_grad():
                values = statistics(self._held, with_gram=True).eigenvalues * (self.num_samples / self._denominator)
        return values.flip(0)[:bound]

    def _rows_of_all(self) -> Tensor:
        """G of a data set, (N, d)."""

        def step(state: State, grads: PerSampleGradients) -> None:
            rows = state["rows"][int(state["count"]) :][: grads.batch_size]
            rows.copy_(_matrix(grads, self._source.like))
            state["count"] += grads.batch_size

        mean = self._moments["mean"]
        state = {"count": mean.new_zeros(()), "rows": mean.new_zeros(self.num_samples, self._dim)}
        return self._source.fold("gradients", state, step)["rows"]

    def _iterate(self, k: int) -> Tensor:
        from scipy.sparse.linalg import eigsh

        # The same start every time, so that products in a checkpoint are found again.
        start = torch.randn(self._dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
        tolerance = max(1e-10, 100 * self._ulp)
        options = {"ncv": _basis(k, self._dim), "v0": start, "tol": tolerance, "return_eigenvectors": False}
        values = torch.from_numpy(eigsh(self.linear_operator(), k, which="LA", **options))
        return values.sort(descending=True)[0].to(self._source.like[0].device)

    def _products(self, rows: Tensor) -> Tensor:
        """D v for each row v, (k, d)."""
        if self._is_zero:
            return torch.zeros_like(rows)
        mean = self._moments["mean"]

        def step(state: State, grads: PerSampleGradients) -> None:
            for index, row in enumerate(rows):
                state["weights"][index] += self._accumulate(state["sum"][index], grads, row, mean)

        state = {"sum": torch.zeros_like(rows), "weights": rows.new_zeros(len(rows))}
        state = self._source.fold(f"product-{fingerprint(rows)}", state, step)
        # The weights sum to zero but for rounding, which g would carry into D.
        return (state["sum"] - state["weights"][:, None] * mean) / self._denominator

    def _accumulate(self, total: Tensor, grads: PerSampleGradients, row: Tensor, mean: Tensor) -> Tensor:
        """Add sum_i w_i g_i with w_i = <g_i - g, v> to `total`; the sum of the weights."""
        weights = self._centred(grads, row, mean)
        total += _flat(grads.combine(weights.to(accumulate_dtype(self._source.like[0].dtype))))
        return weights.sum()

    def _centred(self, grads: PerSampleGradients, row: Tensor, mean: Tensor) -> Tensor:
        """<g_i - g, v>, (B,)."""
        parts = [part.to(like) for part, like in zip(self._split(row), self._source.like, strict=True)]
        return grads.align(parts).double() - mean @ row

    def _rows(self, vectors: Tensor | Sequence[Tensor]) -> Tensor:
        """Vectors in any of their forms as (k, d)."""
        like = self._source.like
        parts = ops.as_list(vectors)
        for part in parts:
            if not isinstance(part, Tensor) or not part.is_floating_point():
                kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"D takes floating-point tensors, got {kind}: convert it, or use linear_operator()")
        if not isinstance(vectors, Tensor):
            shapes, expected = [tuple(p.shape) for p in parts], [tuple(t.shape) for t in like]
            if shapes != expected:
                raise ValueError(f"vector has the shapes {shapes}: pass one tensor per parameter, {expected}")
            vectors = _flat(parts)
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self._dim or vectors.numel() == 0:
            raise ValueError(f"vectors have shape {tuple(vectors.shape)}: pass ({self._dim},) or ({self._dim}, k)")
        # Rounded as the gradients are, so that <g_i, v> and <g, v> mean the same v.
        return vectors.detach().reshape(self._dim, -1).T.to(like[0]).double().contiguous()

    def _split(self, row: Tensor) -> list[Tensor]:
        """(d,) as one tensor per parameter."""
        like = self._source.like
        return [part.view(t.shape) for part, t in zip(row.split([t.numel() for t in like]), like, strict=True)]


def _merge(state: State, grads: PerSampleGradients) -> None:
    """Moments of the union of two sets of samples (Chan, Golub and LeVeque, 1983)."""
    stats = statistics(grads, with_gram=False)
    total = state["count"] + grads.batch_size
    delta = _flat(grads.mean()) - state["mean"]
    state["scatter"] += stats.squared_norms.sum(dtype=torch.float64)
    state["scatter"] += delta.square().sum() * state["count"] * grads.batch_size / total
    state["mean"] += delta * grads.batch_size / total
    largest = stats.squared_norms.add(stats.alignments, alpha=2).max() + stats.grad_norm.square()
    torch.maximum(state["largest"], largest.double(), out=state["largest"])
    state["count"].copy_(total)


@torch.no_grad()
def _deviations(grads: ops.Tensors) -> list[Tensor]:
    """g_i - g in the accumulation dtype, from which D is the same; small differences keep their digits."""
    grads = [g.to(accumulate_dtype(g.dtype)) for g in ops.checked_grads(grads)]
    return [g - g.mean(0) for g in grads]


def _matrix(grads: PerSampleGradients, like: list[Tensor]) -> Tensor:
    """G, (B, d), in float64."""
    if hasattr(grads, "dense"):
        return torch.cat([t.flatten(1).double().to(like[0].device) for t in grads.dense()], 1)
    identity = torch.eye(grads.batch_size, dtype=accumulate_dtype(like[0].dtype), device=like[0].device)
    return torch.stack([_flat(grads.combine(row)) for row in identity])


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    parts = [t.detach().reshape(-1) for t in tensors]
    return torch.cat([part.to(parts[0].device, torch.float64) for part in parts])


def _basis(k: int, dim: int) -> int:
    """Vectors ARPACK keeps."""
    return min(dim, max(2 * k + 1, 20))
