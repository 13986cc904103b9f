"""Contributions to the rows of a table are exact, sum in one order, and let the host wait for no numbers."""

import pytest
import torch
from contribution_cases import of_bags, of_embedding, with_blocks
from oracle import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rgd_ext
from rgd_ext import linalg
from rgd_ext.contributions.outer import Outer
from rgd_ext.contributions.rows import Rows, Tied

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


B, ROWS, WIDTH = 6, 9, 4


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that is treated like those of other devices."""

    is_cpu = False


def entries(kind):
    """Sample and row of each entry; samples share rows, and have some twice."""
    if kind == "none":
        return torch.zeros(2, 0, dtype=torch.int64)
    if kind == "sequences":
        return torch.stack([torch.arange(B).repeat_interleave(7), torch.randint(ROWS, (7 * B,))])
    # Samples of any length, one without entries, in no order.
    return torch.stack([torch.randint(B - 1, (40,)), torch.randint(ROWS, (40,))])


def rows_of(kind, dtype=torch.float64, tensor=Elsewhere):
    samples, indices = entries(kind)
    grads = torch.randn(len(samples), WIDTH).to(dtype)
    return Rows(*(x.as_subclass(tensor) for x in (samples, indices, grads)), torch.Size((ROWS, WIDTH)), B)


def explicit(rows):
    """(B, rows, n), entry by entry."""
    grads = torch.zeros(B, *rows.shape, dtype=torch.float64)
    for sample, row, grad in zip(rows.samples, rows.indices, rows.output_grads, strict=True):
        grads[int(sample), int(row)] += grad.double().as_subclass(torch.Tensor)
    return grads


KINDS = ["sequences", "bags", "none"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_away_from_the_cpu_matches_explicit_gradients(kind, dtype):
    rows = rows_of(kind, dtype)
    grads, weights, vector = explicit(rows), torch.randn(B).to(dtype), torch.randn(ROWS, WIDTH).to(dtype)
    accumulate = linalg.accumulate_dtype(dtype)
    for result, wanted, precision in (
        (rows.gram(), grads.flatten(1) @ grads.flatten(1).T, accumulate),
        (rows.align(vector), grads.flatten(1) @ vector.double().flatten(), accumulate),
        (rows.combine(weights), (weights.double() @ grads.flatten(1)).view_as(vector), dtype),
        (rows.dense(), grads, dtype),
        (rows.add_to(grads.to(dtype, copy=True)), 2 * grads, dtype),
    ):
        assert result.dtype == precision
        assert result.shape == wanted.shape
        assert_close(result, wanted)


@pytest.mark.parametrize("block", [1, 60, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_table_away_from_the_cpu_matches_explicit_gradients(kind, block, monkeypatch):
    with_blocks(monkeypatch, block)
    x, e = (torch.randn(B, 3, n, dtype=torch.float64).as_subclass(Elsewhere) for n in (WIDTH, ROWS))
    tied = Tied(Outer(x, e, torch.Size((ROWS, WIDTH))), rows_of(kind))
    grads = (e.mT @ x).as_subclass(torch.Tensor) + explicit(tied.rows)
    assert_close(tied.dense(), grads)
    grads = grads.flatten(1)
    assert_close(tied.gram(), grads @ grads.T)
    for result, wanted in zip(tied.moments(), rgd_ext.ops.scalar_moments(grads), strict=True):
        assert_close(result, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [1, 30, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_the_gramian_of_explicit_gradients(kind, number, device, monkeypatch):
    with_blocks(monkeypatch, number)
    rows = rows_of(kind, tensor=torch.Tensor)
    keys, places = rows.keys().unique(return_inverse=True)
    sums = torch.zeros(len(keys), WIDTH, dtype=torch.float64).index_add_(0, places, rows.output_grads)
    arguments = keys.to(device), sums.to(device), ROWS, B
    gram, grads = torch.ops.rgd_ext.embedding_gram(*arguments), explicit(rows).flatten(1)
    assert torch.equal(gram, gram.T)
    assert_close(gram.cpu(), grads @ grads.T)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.rgd_ext.embedding_gram.default, arguments, test_utils=tests)


# Their sums are in the order in which threads get there; of integers the order does not matter.
ATOMIC = {"index_add", "scatter_add", "scatter_reduce", "index_reduce", "put", "bincount", "histc", "cumsum"}


class Deterministic(TorchDispatchMode):
    """Refuses operators that add up by atomics on CUDA."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        is_accumulating = "index_put" in name and (*args, False, False)[3]
        if is_accumulating or (name in ATOMIC and args[0].is_floating_point()):
            raise AssertionError(f"{name} is not deterministic on CUDA")
        return func(*args, **(kwargs or {}))


def without_numbers(call):
    """`call` on tensors that have none: reading one raises."""
    with torch.device("meta"), Deterministic():
        return call()


def empty_rows():
    samples = torch.zeros(40, dtype=torch.int64)
    return Rows(samples, samples, torch.empty(40, WIDTH), torch.Size((ROWS, WIDTH)), B)


def empty_tied():
    outer = Outer(torch.empty(B, 3, WIDTH), torch.empty(B, 3, ROWS), torch.Size((ROWS, WIDTH)))
    return Tied(outer, empty_rows())


CALLS = {
    "gram": lambda factor: factor.gram(),
    "moments": lambda factor: factor.moments()[0],
    "align": lambda factor: factor.align(torch.empty(ROWS, WIDTH)),
    "combine": lambda factor: factor.combine(torch.empty(B)),
    "dense": lambda factor: factor.dense(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("factor", [empty_rows, empty_tied])
def test_the_host_waits_for_nothing_and_sums_have_one_order(factor, call):
    assert without_numbers(lambda: CALLS[call](factor())).is_meta


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"scale_grad_by_freq": True}], ids=str)
def test_the_rule_of_an_embedding_waits_for_nothing(options):
    def rule():
        indices = torch.zeros(B, 7, dtype=torch.int64)
        return of_embedding(nn.Embedding(ROWS, WIDTH, **options), indices, torch.empty(B, 7, WIDTH))

    assert without_numbers(rule).output_grads.is_meta


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_rule_of_bags_waits_for_nothing(mode):
    def rule():
        bag = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, padding_idx=0)
        return of_bags(bag, torch.zeros(B, 7, dtype=torch.int64), torch.empty(B, WIDTH))

    assert without_numbers(rule).output_grads.is_meta


@pytest.mark.parametrize("products", [1, 50, 1 << 20])
def test_gramian_of_an_embedding_is_exact_whether_few_samples_share_a_row_or_all(products, monkeypatch):
    monkeypatch.setattr(Rows, "_PRODUCTS", products)
    indices = torch.randint(40, (7, 12)).clamp(min=25)
    indices[:, 0], indices[2] = 3, 4
    factor = Rows.of_sequences(indices, torch.randn(7, 12, 5), torch.Size((40, 5)))
    explicit = factor.dense().flatten(1)
    assert_close(factor.gram(), explicit @ explicit.T)
