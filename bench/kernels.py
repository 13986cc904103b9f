"""The operators on materialised per-sample gradients against plain PyTorch and against reading G.

Direction: `precondition` against the formula as written, against the best three reads of G in plain PyTorch, and
against the fastest way found to read G twice. Many tensors against one tensor of the same size. Gramian against
G @ G.T. Everything in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from rgd_ext import ops, reference

from .measure import Samples, fastest, interleave, show, write_json

EPSILON = 0.01
Arms = dict[str, Callable[[], object]]


def naive(grads: Tensor) -> Tensor:
    """(I - eps D) g as eq. (10) is written."""
    mean = grads.mean(0)
    centred = grads - mean
    return mean - EPSILON * (centred.T @ (centred @ mean)) / grads.shape[0]


def three_reads() -> dict[str, Callable[[Tensor], Tensor]]:
    """Mean, alignments, weighted sum: every combination of two ways to write each in plain PyTorch."""
    means = {"mean": lambda g: g.mean(0), "1@G": lambda g: g.new_full((g.shape[0],), 1 / g.shape[0]) @ g}
    products = {"G@g": lambda g, m: g @ m, "(G*g).sum": lambda g, m: (g * m).sum(1)}
    sums = {"w@G": lambda g, w: w @ g, "(w*G).sum": lambda g, w: (w[:, None] * g).sum(0)}

    def arm(mean, align, combine):
        def direction(grads: Tensor) -> Tensor:
            alignments = align(grads, mean(grads))
            return combine(grads, (1 - EPSILON * (alignments - alignments.mean())) / grads.shape[0])

        return direction

    names = product(means, products, sums)
    return {f"{m}, {p}, {s}": arm(means[m], products[p], sums[s]) for m, p, s in names}


def two_reads() -> dict[str, Callable[[Tensor], object]]:
    """Ways to read G twice and do next to nothing with it."""
    return {
        "2 x sum": lambda g: (g.sum(), g.sum()),
        "2 x dot": lambda g: (torch.dot(g.view(-1), g.view(-1)), torch.dot(g.view(-1), g.view(-1))),
        "2 x 1@G": lambda g: (g.new_ones(g.shape[0]) @ g, g.new_ones(g.shape[0]) @ g),
    }


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """Agreement with float64 to a few roundings of the largest value."""
    error = (got.double() - want).abs().max() / want.abs().max()
    if not error < 1e-5:
        raise AssertionError(f"{what} differs from float64 by {error:.1e} of its largest value")


def bench_direction(shape: tuple[int, int], rounds: int) -> Samples:
    """Times of all arms on one (B, d) tensor, and prints how they compare."""
    grads = torch.randn(shape).add_(0.1)
    epsilon = torch.tensor(EPSILON)
    # Some columns only: a whole G in float64, and the formula as written on it, would take gigabytes.
    columns = grads[:, :50_000].contiguous()
    want = reference.precondition([columns.double()], epsilon.double())[0]
    assert_close(ops.precondition(columns, epsilon)[0], want, "precondition")
    for name, arm in {"naive": naive, **three_reads()}.items():
        assert_close(arm(columns), want, name)

    plain, reads = three_reads(), two_reads()
    arms: Arms = {"precondition": lambda: ops.precondition(grads, epsilon), "naive": lambda: naive(grads)}
    arms |= {name: lambda arm=arm: arm(grads) for name, arm in {**plain, **reads}.items()}
    # All ways once, then the best of each kind in earnest.
    first = interleave(arms, rounds=3, warm_up=1)
    kept = ["precondition", "naive", fastest(first, list(plain)), fastest(first, list(reads))]
    return interleave({name: arms[name] for name in kept}, rounds)


def resnet_like_shapes(weights: int) -> list[int]:
    """161 sizes as a ResNet-50 has them, two small tensors for every large one, `weights` in all."""
    sizes = [64 * 2 ** (index % 6) for index in range(107)]
    large = [(1 + index % 9) ** 2 for index in range(54)]
    scale = (weights - sum(sizes)) / sum(large)
    sizes += [int(scale * size) for size in large]
    return sizes


def bench_many(batch_size: int, weights: int, rounds: int) -> Samples:
    """161 tensors against one tensor of the same number of weights."""
    sizes = resnet_like_shapes(weights)
    many = [torch.randn(batch_size, size) for size in sizes]
    flat = torch.randn(batch_size, sum(sizes))
    epsilon = torch.tensor(EPSILON)
    few = [g[:, :2000].contiguous() for g in many]
    wanted = reference.precondition([g.double() for g in few], epsilon.double())
    assert_close(torch.cat(ops.precondition(few, epsilon)), torch.cat(wanted), "precondition of many tensors")
    arms: Arms = {
        f"{len(sizes)} tensors": lambda: ops.precondition(many, epsilon),
        "flat": lambda: ops.precondition(flat, epsilon),
    }
    return interleave(arms, rounds)


def bench_gram(shape: tuple[int, int], rounds: int) -> Samples:
    """The Gramian against torch's matrix product."""
    grads = torch.randn(shape)
    columns = grads[:, :50_000].contiguous()
    assert_close(ops.gram(columns), columns.double() @ columns.double().T, "gram")
    return interleave({"gram": lambda: ops.gram(grads), "G @ G.T": lambda: grads @ grads.T}, rounds)


def run(quick: bool, json_path: str | None) -> None:
    """Run all parts, print a table and write the raw samples."""
    million = 10**5 if quick else 10**6
    rounds = 5 if quick else 15
    torch.manual_seed(0)
    results: dict[str, Samples] = {}
    for batch_size in (32, 128, 512):
        shape = (batch_size, million)
        results[f"direction {shape}"] = bench_direction(shape, rounds)
    results[f"direction, B = 16, {25 * million} weights"] = bench_many(16, 25 * million, rounds)
    for shape in ((128, million), (16, 25 * million), (512, million // 5)):
        results[f"gram {shape}"] = bench_gram(shape, rounds)

    show(results, "float32, CPU")
    if json_path:
        write_json(json_path, {"benchmark": "kernels", "milliseconds": results})
