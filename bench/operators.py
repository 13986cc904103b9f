"""Operators at the sizes of layers and Gramians, each against other ways to compute the same result.

Every way is first compared with float64. A way that does not agree is left out; if it is the operator, that is a
failure. On CUDA, times are those of a graph replay on cold buffers, or of calls from Python where a way cannot be
captured, and convolutions use TF32, which is torch's default.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rgd_ext import convolutions as conv
from rgd_ext import ops
from rgd_ext.ops import DEFAULTS

from .gradients.cases import DTYPES
from .measuring import cuda_timing
from .measuring.agreement import TOLERANCE, error, without_tf32
from .measuring.inputs import dtype_name, random
from .measuring.report import Record, Section, reason, show
from .measuring.selection import chosen, run_recorded
from .measuring.timing import Clock, Samples, interleave, ratio_text

HEADER = ("case", "way", "median us", "GB/s of inputs", "time / operator (quartiles)", "error")
OPERATOR = "operator"
MILLISECONDS = 1_000  # per case
MOST_BUFFERS = 16  # in a training step, the kernel before has just written a small input, so it may be in the cache


@dataclass(frozen=True)
class Case:
    """Ways to compute a function of `inputs()`, first that of the operator. `exact` is called with float64 inputs."""

    inputs: Callable[[], tuple[Tensor, ...]]
    exact: Callable[..., object]
    ways: dict[str, Callable[..., object]]


@dataclass
class Result:
    """The measurements of one case, by way."""

    case: str
    bytes: int
    milliseconds: Samples = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def several(number: int, *arguments: object) -> tuple[Tensor, ...]:
    """So many tensors of one shape, dtype and device."""
    return tuple(random(*arguments) for _ in range(number))


def gramian(batch_size: int, device: str) -> tuple[Tensor]:
    rows = random((batch_size, 4 * batch_size), torch.float32, device)
    return (rows @ rows.T,)


def gramians(batch_sizes: Sequence[int], device: str) -> Iterator[tuple[str, Case]]:
    for size in batch_sizes:
        ways = {OPERATOR: ops.largest_eigenvalue, "eigvalsh": lambda k: torch.linalg.eigvalsh(k)[-1]}
        yield (
            f"lambda_max, B = {size}",
            Case(partial(gramian, size, device), partial(DEFAULTS["largest_eigenvalue"], ulp=0), ways),
        )
    ways = {OPERATOR: ops.gram_moments, "PyTorch": DEFAULTS["gram_moments"]}
    yield f"moments of a Gramian, B = {size}", Case(partial(gramian, size, device), DEFAULTS["gram_moments"], ways)


def products(sizes: dict[int, int], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Case]]:
    for batch_size, columns in sizes.items():
        inputs = partial(several, 1, (batch_size, columns), dtype, device)
        ways = {OPERATOR: ops.gram, "G @ G.T": lambda g: g @ g.T}
        yield f"Gramian, B = {batch_size}, n = {columns:.0e}", Case(inputs, lambda g: g @ g.T, ways)


def norms(images: Sequence[int], tokens: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Case]]:
    def case(shape: Sequence[int], name: str, *options: object) -> Case:
        ways = {OPERATOR: getattr(ops, name), "PyTorch": DEFAULTS[name]}
        with_options = {way: lambda e, x, f=function: f(e, x, *options) for way, function in ways.items()}
        return Case(partial(several, 2, shape, dtype, device), with_options["PyTorch"], with_options)

    yield f"GroupNorm, 8 groups, {tuple(images)}", case(images, "group_norm_grads", 8, 1e-5)
    yield f"LayerNorm, {tuple(tokens)}", case(tokens, "layer_norm_grads", 1e-5, True)
    yield f"RMSNorm, {tuple(tokens)}", case(tokens, "layer_norm_grads", 1e-5, False)


def by_f_unfold(e: Tensor, x: Tensor) -> Tensor:
    """Per-sample weight gradients of a 3 x 3 convolution by F.unfold and a batched matrix product."""
    grads = e.flatten(2) @ F.unfold(x, 3, padding=1).mT
    return grads.view(len(e), e.shape[1], x.shape[1], 3, 3)


def convolutions(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Case]]:
    geometry = [3, 3], [1, 1], [1, 1], [1, 1]

    def by_unfolding(e: Tensor, x: Tensor) -> Tensor:
        grads = e.new_empty(len(e), e.shape[1], x.shape[1], 3, 3)
        conv.conv_weight_grads_by_unfolding(e, x, conv.Geometry(*geometry, 1), grads)
        return grads

    # On CUDA the operator runs a cuDNN convolution in which every sample is a group.
    ways = {
        OPERATOR: lambda e, x: ops.conv_weight_grads(e, x, *geometry, 1),
        "by unfolding": by_unfolding,
        "F.unfold": by_f_unfold,
    }
    for shape in shapes:
        yield f"Conv2d 3 x 3, {tuple(shape)}", Case(partial(several, 2, shape, dtype, device), by_f_unfold, ways)


def cases(device: str, quick: bool) -> dict[str, Case]:
    """All cases by name."""
    found = dict(gramians((16,) if quick else (64, 128, 256, 512), device))
    images, tokens = ((4, 16, 8, 8), (4, 16, 32)) if quick else ((64, 128, 32, 32), (8, 1024, 768))
    shapes = [(4, 8, 6, 6)] if quick else [(64, 64, 32, 32), (64, 256, 8, 8)]
    sizes = {8: 1000} if quick else {8: 10**7, 128: 10**6}
    for dtype in DTYPES:
        for kind in (
            norms(images, tokens, dtype, device),
            products(sizes, dtype, device),
            convolutions(shapes, dtype, device),
        ):
            found |= {f"{name}, {dtype_name(dtype)}": case for name, case in kind}
    return found


def agreeing(case: Case, inputs: tuple[Tensor, ...], result: Result) -> dict[str, Callable[[tuple], object]]:
    """The ways that run and agree with float64, as functions of the tuple of inputs."""
    want, kept = case.exact(*tree_map_only(Tensor, Tensor.double, inputs)), {}
    for name, way in case.ways.items():
        try:
            with without_tf32():
                wrong = result.error[name] = error(way(*inputs), want)
            if not wrong < TOLERANCE[inputs[0].dtype]:
                result.left_out[name] = f"differs from float64 by {wrong:.1e} of its largest value"
                continue
        except Exception as problem:
            result.left_out[name] = reason(problem)
            continue
        kept[name] = lambda arguments, way=way: way(*arguments)
    return kept


def clocks_of(ways: dict[str, Callable], buffers: list[tuple], device: str, result: Result) -> dict[str, Clock]:
    found, timer = {}, cuda_timing.timer(device)
    for name, way in ways.items():
        found[name], problem = timer(way, buffers)
        if problem is not None:
            result.left_out[f"{name} as a graph"] = reason(problem)
    return found


def bench(name: str, case: Case, device: str, quick: bool) -> Result:
    """Agreement and times of all ways on one case."""
    inputs = case.inputs()
    size = sum(part.nbytes for part in tree_leaves(inputs))
    copies = min(cuda_timing.number_of_buffers(size, device), MOST_BUFFERS)
    buffers = [inputs, *(case.inputs() for _ in range(copies - 1))]
    result = Result(name, size)
    timed = clocks_of(agreeing(case, inputs, result), buffers, device, result)
    first = interleave(timed, rounds=1, warm_up=1)
    one_round = len(buffers) * sum(times[0] for times in first.values())
    rounds = 3 if quick else max(5, min(30, int(MILLISECONDS / one_round))) if timed else 0
    result.milliseconds = interleave(timed, rounds)
    return result


def section(result: Result) -> Section:
    """Rows of a table."""
    rows = []
    for name, times in result.milliseconds.items():
        median = statistics.median(times)
        spread = ratio_text(result.milliseconds, name, OPERATOR) if OPERATOR in result.milliseconds else ""
        numbers = f"{1e3 * median:.4g}", f"{result.bytes / median / 1e6:.0f}", spread, f"{result.error[name]:.0e}"
        rows.append(["" if rows else result.case, name, *numbers])
    return rows


def failures_of(result: Result) -> list[str]:
    return [f"{result.case}: {name}: {why}" for name, why in result.left_out.items() if name.startswith(OPERATOR)]


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the cases that `only` chooses, print a table and write the raw samples; returns what failed."""
    record, failures = Record(json, "operators", device), []
    torch.manual_seed(0)

    def report(result: Result) -> None:
        failures.extend(failures_of(result))
        times = {way: f"{1e3 * statistics.median(t):.4g} us" for way, t in result.milliseconds.items()}
        print(f"{result.case}: {times}; left out: {result.left_out}", flush=True)

    wanted = chosen(cases(device, quick), only)
    results = run_recorded(record, "cases", wanted, partial(bench, device=device, quick=quick), report, failures)
    show(HEADER, [section(result) for result in results], f"operators, {device}")
    return failures
