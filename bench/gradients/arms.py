"""Ways to compute on per-sample gradients, given as (B, n) matrices: our operators, plain PyTorch, and reads only."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from rgd_ext import ops
from rgd_ext.linalg import accumulate_dtype

from ..measuring.agreement import TOLERANCE
from .cases import Case

Grads = list[Tensor]

# Plain PyTorch is allowed larger errors, because it computes alignments as differences of large numbers.
PLAIN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
TF32_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Arm:
    """One way to compute `kind`: the direction, the moments, the Gramian, or nothing (read)."""

    call: Callable[[Grads], object]
    kind: str
    tolerance: float
    ours: bool = False
    flat: bool = False  # called with the gradients as one tensor


def naive(grads: Grads, epsilon: Tensor) -> Grads:
    """(I - eps D) g by the formula of eq. (10)."""
    means = [g.mean(0) for g in grads]
    centred = [g - m for g, m in zip(grads, means, strict=True)]
    products = sum(c @ m for c, m in zip(centred, means, strict=True))
    return [m - epsilon * (c.T @ products) / len(c) for c, m in zip(centred, means, strict=True)]


def matrix_vector(grad: Tensor, vector: Tensor) -> Tensor:
    """G v, on CUDA in the accumulation dtype: in half precision the alignments would be rounded away."""
    if grad.is_cuda and grad.dtype != accumulate_dtype(grad.dtype):
        return torch.mm(grad, vector[:, None], out_dtype=torch.float32)[:, 0]
    return grad @ vector


MEANS = {"mean": lambda g: g.mean(0), "1@G": lambda g: g.new_full((len(g),), 1 / len(g)) @ g}
PRODUCTS = {"G@g": matrix_vector, "(G*g).sum": lambda g, m: (g * m).sum(1, dtype=accumulate_dtype(g.dtype))}
SUMS = {"w@G": lambda g, w: w @ g, "(w*G).sum": lambda g, w: (w[:, None] * g).sum(0)}


def three_reads(mean: str, align: str, combine: str) -> Callable[[Grads, Tensor], Grads]:
    """The direction in three reads of G: mean, alignments, weighted sum. The names choose how PyTorch computes each."""

    def direction(grads: Grads, epsilon: Tensor) -> Grads:
        alignments = sum(PRODUCTS[align](g, MEANS[mean](g)) for g in grads)
        weights = (1 - epsilon * (alignments - alignments.mean())) / len(alignments)
        return [SUMS[combine](g, weights.to(g.dtype)) for g in grads]

    return direction


# Ways to read G twice with almost no arithmetic.
TWO_READS: dict[str, Callable[[Tensor], object]] = {
    "2 x sum": lambda g: (g.sum(), g.sum()),
    "2 x amax": lambda g: (g.amax(), g.amax()),
    "2 x dot": lambda g: (torch.dot(g.view(-1), g.view(-1)), torch.dot(g.view(-1), g.view(-1))),
    "2 x 1@G": lambda g: (g.new_ones(len(g)) @ g, g.new_ones(len(g)) @ g),
}


def matrix_product(grads: Grads) -> Tensor:
    """The Gramian by torch's matrix product."""
    return sum(g @ g.T for g in grads)


def with_tf32(call: Callable[[Grads], object]) -> Callable[[Grads], object]:
    """`call` with TF32 allowed in matrix products."""

    def run(grads: Grads) -> object:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call(grads)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def why_no_compile(case: Case, device: str, quick: bool) -> str | None:
    """The reason why torch.compile has no arm for this case; None if it has one."""
    if case.many:
        return "compiling a kernel per shape takes minutes"
    if device == "cpu" and quick:
        return "on the CPU only in the full run"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        return "there is no C++ compiler"
    return None


def compiled(epsilon: Tensor) -> dict[str, Callable[[Grads], object]]:
    """The three reads by Inductor, which compiles each of them to one kernel."""
    direction = three_reads("mean", "(G*g).sum", "(w*G).sum")
    # The benchmark captures graphs itself. Those of Inductor would first copy G.
    modes = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}
    functions = {name: torch.compile(direction, dynamic=False, mode=mode) for name, mode in modes.items()}
    return {name: lambda g, f=function: f(g, epsilon) for name, function in functions.items()}


def arms(case: Case, epsilon: Tensor, compile_too: bool) -> dict[str, Arm]:
    """All arms for a case by name, ours first. The part of a name before a colon is the role of the arm."""
    ours, plain = TOLERANCE[case.dtype], PLAIN_TOLERANCE[case.dtype]
    found = {"precondition": Arm(lambda g: ops.precondition(g, epsilon), "direction", ours, ours=True)}
    if case.many:
        flat = Arm(lambda g: ops.precondition(g, epsilon), "direction", ours, ours=True, flat=True)
        found["precondition of one tensor"] = flat
    found["naive"] = Arm(lambda g: naive(g, epsilon), "direction", plain)
    for ways in product(MEANS, PRODUCTS, SUMS):
        direction = three_reads(*ways)
        found[f"eager: {', '.join(ways)}"] = Arm(lambda g, f=direction: f(g, epsilon), "direction", plain)
    if compile_too:
        for mode, function in compiled(epsilon).items():
            found[f"compile: {mode}"] = Arm(function, "direction", plain)
    for name, read in TWO_READS.items():
        found[f"read: {name}"] = Arm(lambda g, f=read: f(g[0]), "read", plain, flat=True)

    found["gram"] = Arm(ops.gram, "gram", ours, ours=True)
    found["G @ G.T"] = Arm(matrix_product, "gram", plain)
    if epsilon.is_cuda and case.dtype == torch.float32:
        found["gram, TF32"] = Arm(with_tf32(ops.gram), "gram", TF32_TOLERANCE, ours=True)
        found["G @ G.T, TF32"] = Arm(with_tf32(matrix_product), "gram", TF32_TOLERANCE)
    found["moments"] = Arm(ops.moments, "moments", ours, ours=True)
    return found
