"""DiffusionMatrix against explicit per-sample gradients by torch.func in float64: batches, data sets, interruptions."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import GPT, MODELS, mlp, resnet
from oracle import assert_close, diffusion_matrix, flat
from torch import nn
from torch.func import functional_call, grad
from torch.utils.data import DataLoader, TensorDataset

import rgd_ext
from rgd_ext import DiffusionMatrix, diffusion, streaming
from rgd_ext.capture.collect import collecting
from rgd_ext.capture.convolution import Convolution
from rgd_ext.capture.embedding import Rows
from rgd_ext.capture.factors import Bias, Dense, Outer
from rgd_ext.reference import Geometry


@pytest.fixture(autouse=True)
def _one_thread():
    # The tensors are too small for a second one.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def token_loss(output, y):
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


# Model, inputs, number of classes, loss.
CASES = {
    "MLP": (mlp, MODELS["MLP"][1], lambda b: torch.randint(3, (b,)), F.cross_entropy),
    "CNN": (resnet, MODELS["ResNet"][1], lambda b: torch.randint(3, (b,)), F.cross_entropy),
    "GPT": (lambda: GPT(6, 4, 8), lambda b: [torch.randint(6, (b, 8))], lambda b: torch.randint(6, (b, 8)), token_loss),
}


def case(name="MLP", size=7, dtype=torch.float64):
    build, inputs, targets, loss = CASES[name]
    (x,) = inputs(size)
    x = x.to(dtype) if x.is_floating_point() else x
    return build().to(dtype).eval(), loss, x, targets(size)


def explicit(model, loss, x, y):
    """G, (B, d): one gradient at a time."""
    model = copy.deepcopy(model).double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = x.double() if x.is_floating_point() else x

    def f(p, i):
        return loss(functional_call(model, p, (x[i : i + 1],)), y[i : i + 1])

    return torch.stack([flat(grad(f)(parameters, i).values()) for i in range(len(x))])


def batches(x, y, size):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def check(matrix, rows, dtype=torch.float64):
    """Every method against the explicit D of `rows`."""
    expected, n = diffusion_matrix(rows), len(rows)
    values = torch.linalg.svdvals(rows - rows.mean(0)).square() / n
    vector, several = torch.randn(len(expected), dtype=dtype), torch.randn(len(expected), 3, dtype=dtype)
    assert matrix.num_samples == n
    assert matrix.shape == expected.shape
    assert_close(matrix @ vector, expected @ vector.double(), dtype)
    assert_close(matrix @ several, expected @ several.double(), dtype)
    assert_close(matrix.quadratic_form(vector), vector.double() @ expected @ vector.double(), dtype)
    assert_close(matrix.quadratic_form(several), (several.double() * (expected @ several.double())).sum(0), dtype)
    assert_close(matrix.trace(), expected.trace(), dtype)
    assert_close(matrix.to_dense(), expected, dtype)
    assert_close(matrix.largest_eigenvalue(), values[0], dtype)
    assert_close(matrix.spectrum(), values[: min(n - 1, len(values))], dtype)
    assert matrix.rank() == torch.linalg.matrix_rank(rows - rows.mean(0))


@pytest.mark.parametrize("name", CASES)
def test_of_a_batch_is_the_explicit_matrix(name):
    model, loss, x, y = case(name)
    check(DiffusionMatrix.from_batch(model, loss, x, y), explicit(model, loss, x, y))


@pytest.mark.parametrize(("name", "size"), [("MLP", 1), ("MLP", 3), ("MLP", 7), ("MLP", 20), ("CNN", 3), ("GPT", 3)])
def test_of_a_data_set_is_the_explicit_matrix_for_any_batch_size(name, size):
    model, loss, x, y = case(name)
    check(DiffusionMatrix.from_dataset(model, loss, batches(x, y, size)), explicit(model, loss, x, y))


@pytest.mark.parametrize("name", CASES)
def test_in_float32(name):
    model, loss, x, y = case(name, dtype=torch.float32)
    rows = explicit(model, loss, x, y)
    values = torch.linalg.svdvals(rows - rows.mean(0)).square() / 7
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3)),
    ):
        vector = torch.randn(rows.shape[1])
        assert_close(matrix @ vector, diffusion_matrix(rows) @ vector.double(), torch.float32)
        assert_close(matrix.spectrum(3), values[:3], torch.float32)
        assert (matrix @ vector).dtype == torch.float32
        assert matrix.rank() == 6


@pytest.mark.parametrize("shape", [(5, 8), (9, 4), (1, 3), (2, 2)], ids=str)
def test_of_tensors_is_the_explicit_matrix(shape):
    rows = torch.randn(shape, dtype=torch.float64)
    if shape[0] > 1:
        check(DiffusionMatrix(rows), rows)
    parts = [rows[:, :1], rows[:, 1:].reshape(shape[0], 1, -1)]
    assert torch.equal(DiffusionMatrix(parts).to_dense(), DiffusionMatrix(rows).to_dense())


class Plain:
    """A source with nothing but the protocol."""

    def __init__(self, rows):
        self.rows, self.batch_size = rows, len(rows)

    def mean(self):
        return [self.rows.mean(0)]

    def align(self, vector):
        return self.rows @ vector[0]

    def gram(self):
        return self.rows @ self.rows.T

    def combine(self, weights):
        return [weights @ self.rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=str)
def test_rank_counts_what_is_above_rounding(shape, dtype):
    low = torch.randn(shape[0], 3, dtype=dtype) @ torch.randn(3, shape[1], dtype=dtype) + torch.randn(shape[1])
    assert DiffusionMatrix(low).rank() == 3


def test_any_source_that_follows_the_protocol_will_do():
    rows = torch.randn(6, 9, dtype=torch.float64)
    check(DiffusionMatrix(Plain(rows)), rows)


def test_both_forms_of_equation_3():
    model, loss, x, y = case()
    rows, n = explicit(model, loss, x, y), len(x)
    second_moment = rows.T @ rows / n - torch.outer(rows.mean(0), rows.mean(0))
    difference = rows[:, None] - rows[None]
    pairwise = torch.einsum("ijr,ijs->rs", difference, difference) / (2 * n * n)
    for matrix in (DiffusionMatrix.from_batch(model, loss, x, y), DiffusionMatrix(rows)):
        assert_close(matrix.to_dense(), second_moment)
        assert_close(matrix.to_dense(), pairwise)


@pytest.mark.parametrize("streamed", [False, True])
def test_symmetric_positive_and_of_rank_below_n(streamed):
    model, loss, x, y = case(size=4)
    matrix = DiffusionMatrix.from_batch(model, loss, x, y)
    if streamed:
        matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    dense, (u, v) = matrix.to_dense(), torch.randn(2, matrix.shape[0], dtype=torch.float64)
    assert torch.equal(dense, dense.T)
    assert_close(u @ (matrix @ v), v @ (matrix @ u))
    assert matrix.quadratic_form(u) >= 0
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12 * matrix.trace()
    assert matrix.rank() == 3
    assert_close(matrix.spectrum().sum(), matrix.trace())
    assert not matrix.spectrum(8)[3:].any()


def test_a_large_mean_does_not_leak_into_d():
    rows = torch.randn(50, 40) + 300
    vector = torch.randn(40)
    # To the rounding of the products <g_i, v>.
    error = (DiffusionMatrix(rows) @ vector).double() - diffusion_matrix(rows.double()) @ vector.double()
    assert error.norm() < 1e-3 * vector.norm()
    half = (rows - 260).bfloat16()
    expected = (half.double() @ vector.bfloat16().double()).var(correction=0)
    assert_close(DiffusionMatrix(half).quadratic_form(vector.double() + 1e-4), expected, torch.bfloat16)


FACTORS = {
    "dense": lambda e, x: Dense(e),
    "outer": lambda e, x: Outer(x, e, torch.Size((7, 6))),
    "bias": lambda e, x: Bias(Outer(x, e, torch.Size((7, 6)))),
    "rows": lambda e, x: Rows.of_sequences(torch.arange(48).view(16, 3) % 5, e, torch.Size((5, 7))),
    "convolution": lambda e, x: Convolution(e, x, torch.Size((3, 3, 1)), Geometry((1,), (1,), (0,), (1,), 1)),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_products_with_gradients_of_low_precision_are_not_rounded(kind):
    e, x = torch.randn(16, 3, 7).bfloat16(), torch.randn(16, 3, 6).bfloat16()
    x = torch.randn(16, 3, 7).bfloat16() if kind == "convolution" else x
    exact = FACTORS[kind](e.double(), x.double())
    vector = torch.randn(exact.dense().shape[1:]).bfloat16()
    # A bias's terms are summed in the backward, in the dtype of the layer.
    tolerance = torch.bfloat16 if kind == "bias" else torch.float32
    found = FACTORS[kind](e, x).align(vector)
    assert found.dtype == torch.float32
    assert_close(found, exact.align(vector.double()), tolerance)


@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_correction_is_that_of_torch_var(correction):
    model, loss, x, y = case()
    rows = explicit(model, loss, x, y)
    for matrix in (
        DiffusionMatrix(rows, correction=correction),
        DiffusionMatrix.from_batch(model, loss, x, y, correction=correction),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), correction=correction),
    ):
        variances = rows.var(0, correction=correction)
        assert_close(matrix.to_dense().diagonal(), variances)
        assert_close(matrix.trace(), variances.sum())
        assert_close(matrix.spectrum().sum(), variances.sum())
        vector = torch.randn(len(variances), dtype=torch.float64)
        assert_close(matrix.quadratic_form(vector), (rows @ vector).var(correction=correction))
        assert_close(vector @ (matrix @ vector), (rows @ vector).var(correction=correction))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_agree_give_exactly_zero(dtype):
    rows = torch.randn(1, 30).expand(8, -1).to(dtype)
    model, loss, x, y = case(dtype=torch.float32 if dtype == torch.bfloat16 else dtype, size=1)
    x, y = x.expand(8, -1).contiguous(), y.expand(8).contiguous()
    for matrix in (
        DiffusionMatrix(rows),
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3)),
    ):
        vector = torch.randn(matrix.shape[0])
        values = [matrix @ vector, matrix.quadratic_form(vector), matrix.trace(), matrix.to_dense(), matrix.spectrum()]
        assert not any(value.any() for value in values)
        assert matrix.largest_eigenvalue() == 0
        assert matrix.rank() == 0


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
@pytest.mark.parametrize("spread", [1e-2, 5e-4, 1e-6])
def test_small_differences_of_tensors_are_not_rounded_away(spread, shape):
    rows = 1 + spread * torch.randn(shape)
    expected, vector = diffusion_matrix(rows.double()), torch.randn(shape[1])
    values = torch.linalg.eigvalsh(expected).flip(0)[: min(shape[0] - 1, shape[1])]
    matrix = DiffusionMatrix(rows)
    assert_close(matrix.trace(), expected.trace(), torch.float32)
    assert_close(matrix.spectrum(), values, torch.float32)
    assert_close(matrix @ vector, expected @ vector.double(), torch.float32)
    assert_close(matrix.quadratic_form(vector), vector.double() @ expected @ vector.double(), torch.float32)
    assert matrix.rank() == len(values)


def test_gradients_of_a_model_agree_below_the_rounding_of_their_products():
    _, _, x, y = case(size=1)
    x = x.expand(8, -1) + 1e-5 * torch.randn(8, 6)
    for dtype, is_zero in ((torch.float32, True), (torch.float64, False)):
        matrix = DiffusionMatrix.from_batch(mlp().to(dtype), F.cross_entropy, x.to(dtype), y.expand(8))
        assert (matrix.trace() == 0) == (matrix.largest_eigenvalue() == 0) == is_zero


def test_one_sample_has_no_diffusion_and_no_unbiased_estimate():
    model, loss, x, y = case(size=1)
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 1)),
    ):
        assert matrix.trace() == matrix.largest_eigenvalue() == matrix.rank() == 0
        assert not (matrix @ torch.ones(matrix.shape[0])).any()
        assert matrix.spectrum().shape == (0,)
    with pytest.raises(ValueError, match="N = 1 samples with correction=1"):
        DiffusionMatrix.from_batch(model, loss, x, y, correction=1)
    with pytest.raises(ValueError, match="N = 1 samples with correction=1"):
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 1), correction=1).trace()


def test_vectors_may_be_lists_shaped_as_the_parameters():
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_batch(model, loss, x, y)
    vector = [torch.randn_like(p) for p in model.parameters()]
    product = matrix @ vector
    assert [p.shape for p in product] == [p.shape for p in model.parameters()]
    assert_close(flat(product), matrix @ flat(vector))
    assert_close(matrix.quadratic_form(vector), flat(vector) @ flat(product))


def test_scipy_view():
    from scipy.sparse.linalg import eigsh

    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    operator, dense = matrix.linear_operator(), matrix.to_dense().numpy()
    array = np.random.default_rng(0).standard_normal((len(dense), 2))
    assert np.allclose(operator @ array, dense @ array, atol=1e-12)
    assert np.allclose(operator.H @ array[:, 0], dense @ array[:, 0], atol=1e-12)
    assert np.allclose(operator @ array.astype("int64"), dense @ array.astype("int64"), atol=1e-12)
    assert np.allclose(eigsh(operator, 2)[0][::-1], matrix.spectrum(2).numpy())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 4])
def test_iterated_spectrum_is_the_exact_one(name, k, monkeypatch):
    model, loss, x, y = case(name, size=12)
    expected = DiffusionMatrix.from_batch(model, loss, x, y).spectrum(k)
    monkeypatch.setattr(diffusion, "_EXACT", 3)
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 5)),
    ):
        assert_close(matrix.spectrum(k), expected, torch.float64)
        with pytest.raises(RuntimeError, match=r"at most min\(N - 1, d\) = 11"):
            matrix.rank()
        with pytest.raises(ValueError, match=r"spectrum\(10\)"):
            matrix.spectrum()


def test_eigenvalues_beyond_the_rank_are_zero_when_iterated(monkeypatch):
    rows = torch.randn(4, 60, dtype=torch.float64)
    expected = DiffusionMatrix(rows).spectrum(6)
    monkeypatch.setattr(diffusion, "_EXACT", 3)
    assert_close(DiffusionMatrix(rows).spectrum(6), expected)


def test_all_eigenvalues_of_few_samples_of_a_large_model(monkeypatch):
    model, loss, x, y = case(size=5)
    expected = DiffusionMatrix.from_batch(model, loss, x, y)
    d = expected.shape[0]
    monkeypatch.setattr(diffusion, "_EXACT", int((5 * d) ** 0.5) + 1)
    assert d > diffusion._EXACT
    loader = Counting(batches(x, y, 2))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader, correction=1)
    assert_close(matrix.spectrum(), expected.spectrum() * 5 / 4)
    assert_close(matrix.spectrum(d)[:4], expected.spectrum() * 5 / 4)
    assert matrix.rank() == expected.rank() == 4
    assert loader.passes == 2
    assert matrix.estimate().passes == matrix.estimate(3).passes == 2
    assert matrix.estimate().bytes < 4 * 8 * 5 * d


def test_all_eigenvalues_of_too_many_samples_name_what_to_call(monkeypatch):
    model, loss, x, y = case()
    monkeypatch.setattr(diffusion, "_EXACT", int((3 * sum(p.numel() for p in model.parameters())) ** 0.5) + 1)
    loader = Counting(batches(x, y, 2))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader)
    message = r"spectrum\(10\).*from_batch takes up to \d+ samples"
    with pytest.raises(ValueError, match=message):
        matrix.spectrum()  # four batches have at least four samples
    assert loader.passes == 0
    matrix = DiffusionMatrix.from_dataset(model, loss, [(x, y)])
    with pytest.raises(ValueError, match=message):
        matrix.spectrum()
    with pytest.raises(RuntimeError, match=rf"at most min\(N - 1, d\) = 6; .*{message}"):
        matrix.rank()


REDUCTIONS = {"mean": nn.CrossEntropyLoss(), "sum": nn.CrossEntropyLoss(reduction="sum")}
REDUCTIONS["none"] = nn.CrossEntropyLoss(reduction="none")
REDUCTIONS["weighted"] = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double(), reduction="sum")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_reduction_is_found(name, size):
    model, _, x, y = case()
    loss = REDUCTIONS[name]
    rows = explicit(model, lambda o, t: loss(o, t).sum(), x, y)
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, size)),
    ):
        assert_close(matrix.to_dense(), diffusion_matrix(rows))


COUPLED = {
    "weights": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double()),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "contrastive": lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o))),
    "contrastive, none": lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o)), reduction="none"),
    "a spread": lambda o, y: o.square().sum() + o.mean(0).square().sum(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_is_not_per_sample_is_refused(name):
    model, _, x, _ = case()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for matrix in (DiffusionMatrix.from_batch, lambda *a: DiffusionMatrix.from_dataset(*a[:2], batches(x, y, 4))):
        with pytest.raises(ValueError, match=r"not a per-sample loss.*'sum' or 'none'"):
            matrix(model, COUPLED[name], x, y).trace()


class Coupled(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 5), nn.Linear(5, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x).tanh()))


BETWEEN_SAMPLES = {
    "centring": lambda h: h - h.mean(0),
    "centring after dropout": lambda h: (kept := F.dropout(h, 0.2)) - kept.mean(0),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "attention": lambda h: (h @ h.T).softmax(-1) @ h,
    "sum over those before": lambda h: h.cumsum(0),
    "sum over those after": lambda h: h.flip(0).cumsum(0).flip(0),
    "neighbour": lambda h: h + h.roll(1, 0),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BETWEEN_SAMPLES)
def test_a_model_that_couples_samples_is_refused(name, training):
    _, loss, x, y = case()
    model = Coupled(BETWEEN_SAMPLES[name]).double().train(training)
    with pytest.raises(ValueError, match=r"mixes samples.*convert_batch_norm"):
        DiffusionMatrix.from_batch(model, loss, x, y)
    # Of a single sample nothing can be seen.
    loader = [(x[:1], y[:1])] * (name != "batch norm") + [*batches(x, y, 3)]
    with pytest.raises(ValueError, match="mixes samples"):
        DiffusionMatrix.from_dataset(model.eval(), loss, loader).trace()


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        return h * self.calls


WITHIN_A_SAMPLE = {
    "dropout": nn.Dropout(0.5),
    "dropout in evaluation": lambda h: F.dropout(h, 0.5),
    "random from elsewhere": lambda h: h * float(np.random.default_rng().random()),
    "state that moves": Counter(),
    "layer norm": nn.LayerNorm(5).double(),
}


@pytest.mark.filterwarnings("ignore:.*its outputs change from call to call")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WITHIN_A_SAMPLE)
def test_a_model_that_is_random_or_moves_state_is_not_taken_for_one_that_couples_samples(name, training):
    _, loss, x, y = case()
    model = Coupled(copy.deepcopy(WITHIN_A_SAMPLE[name])).double().train(training)
    before = [b.clone() for b in model.buffers()]
    assert DiffusionMatrix.from_batch(model, loss, x, y).trace() > 0
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_what_all_samples_share_may_have_their_number():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x, mask):
            return self.head(F.scaled_dot_product_attention(x, x, x, mask)[:, -1])

    mask, x, y = torch.ones(7, 7, dtype=torch.bool).tril(), torch.randn(7, 7, 6).double(), torch.randint(3, (7,))
    assert DiffusionMatrix.from_batch(Attention().double(), F.cross_entropy, (x, mask), y).rank() == 6


def test_a_model_is_looked_at_once():
    model, loss, x, y = case()
    forwards = []
    model.register_forward_pre_hook(lambda module, inputs: forwards.append(torch.is_grad_enabled()))
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    matrix.trace(), matrix @ torch.ones(matrix.shape[0])
    assert forwards == [True] * 6


def test_an_ignored_target_in_a_later_batch_is_noticed():
    model, _, x, _ = case()
    y = torch.tensor([0, 2, 2, 0, 0, 1, 0])
    matrix = DiffusionMatrix.from_dataset(model, nn.CrossEntropyLoss(ignore_index=1), batches(x, y, 3))
    with pytest.raises(ValueError, match="not a per-sample loss"):
        matrix.trace()


def test_a_reduction_that_changes_is_noticed():
    model, _, x, y = case()
    loader = list(batches(x, y, 3))

    def loss(output, y):
        return F.cross_entropy(output, y, reduction="sum" if y is loader[1][1] else "mean")

    with pytest.raises(ValueError, match="not a per-sample loss"):
        DiffusionMatrix.from_dataset(model, loss, loader).trace()


def test_targets_and_inputs_in_nests():
    model = nn.Bilinear(3, 2, 1).double().eval()
    left, right, target = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.randn(6, 1).double()
    names = ["low", "high"] * 3

    def loss(output, y):
        scale = torch.tensor([[2.0 if name == "high" else 1.0] for name in y["name"]])
        return (scale * (output - y["target"]).square()).mean()

    matrix = DiffusionMatrix.from_batch(model, loss, (left, right), {"target": target, "name": names})
    loader = [((left[i::2], right[i::2]), {"target": target[i::2], "name": names[i::2]}) for i in range(2)]
    assert_close(DiffusionMatrix.from_dataset(model, loss, loader).to_dense(), matrix.to_dense())
    by_name = DiffusionMatrix.from_batch(
        model, loss, {"input1": left, "input2": right}, {"target": target, "name": names}
    )
    assert torch.equal(by_name.to_dense(), matrix.to_dense())


class Untouched:
    """A model in which all that could be changed by looking at it is there to compare."""

    def __init__(self, captured):
        self.model = nn.Sequential(nn.Linear(6, 5), nn.InstanceNorm1d(1, track_running_stats=True), nn.Dropout(0.5))
        self.model = nn.Sequential(nn.Unflatten(1, (1, 6)), *self.model, nn.Flatten(), nn.Linear(5, 3)).double()
        self.handle = rgd_ext.precondition(self.model) if captured else None
        self.x, self.y = torch.randn(8, 6).double(), torch.randint(3, (8,))
        F.cross_entropy(self.model(self.x), self.y).backward()

    def state(self):
        forwards = [module.__dict__.get("forward") for module in self.model.modules()]
        hooks = [list(p._backward_hooks or ()) for p in self.model.parameters()]
        grads = [p.grad.clone() for p in self.model.parameters()]
        tensors = [*grads, *self.model.state_dict().values(), torch.get_rng_state()]
        stats = self.handle and self.handle.stats
        return forwards, hooks, stats, [t.clone() for t in tensors]

    def assert_same(self, before):
        after = self.state()
        assert after[:3] == before[:3]
        assert all(torch.equal(a, b) for a, b in zip(after[3], before[3], strict=True))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_model_gradients_capture_and_random_numbers_are_left_as_found(streamed, captured):
    found = Untouched(captured)
    if streamed:
        found.model.eval()
    before = found.state()
    if streamed:
        DiffusionMatrix.from_dataset(found.model, F.cross_entropy, batches(found.x, found.y, 3)).spectrum()
    else:
        DiffusionMatrix.from_batch(found.model, F.cross_entropy, found.x, found.y).spectrum()
    found.assert_same(before)
    with pytest.raises(ValueError, match="not a per-sample loss"):
        DiffusionMatrix.from_batch(found.model, COUPLED["contrastive"], found.x, found.y)
    found.assert_same(before)


def test_a_captured_model_gives_the_same_matrix_and_goes_on_training():
    model, loss, x, y = case()
    expected = DiffusionMatrix.from_batch(model, loss, x, y).to_dense()
    optimizer = rgd_ext.RGD(model)
    assert torch.equal(DiffusionMatrix.from_batch(model, loss, x, y).to_dense(), expected)
    with optimizer.preconditioner.accumulate():
        loss(model(x[:3]), y[:3]).backward()
        inside = DiffusionMatrix.from_batch(model, loss, x, y)
        loss(model(x[3:]), y[3:]).backward()
    assert torch.equal(inside.to_dense(), expected)
    assert optimizer.preconditioner.stats.batch_size == 7


def test_a_paused_or_half_captured_model_is_refused():
    model, loss, x, y = case()
    with rgd_ext.precondition(model) as handle, handle.paused(), pytest.raises(RuntimeError, match=r"paused\(\)"):
        DiffusionMatrix.from_batch(model, loss, x, y)
    with rgd_ext.precondition(model[0]), pytest.raises(ValueError, match="captured already"):
        DiffusionMatrix.from_batch(model, loss, x, y)


def test_a_capture_that_allows_batch_normalisation_does_not_make_its_losses_per_sample():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double()
    _, loss, x, y = case()
    with rgd_ext.precondition(model, batch_norm="contribution"), pytest.raises(ValueError, match="normalises"):
        DiffusionMatrix.from_batch(model, loss, x, y)


def test_inputs_and_losses_with_gradients_of_their_own_get_none():
    model, _, x, y = case()
    x.requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    DiffusionMatrix.from_batch(model, lambda o, t: scale * F.cross_entropy(o, t), x, y)
    assert x.grad is None
    assert scale.grad is None


def test_frozen_and_unused_parameters():
    model, loss, x, y = case()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.randn(2).double())
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:5]), x)
    matrix = DiffusionMatrix.from_batch(model, loss, x, y)
    assert matrix.shape[0] == sum(p.numel() for p in trainable)
    assert matrix.rank() == 6


@pytest.mark.parametrize("name", CASES)
def test_captured_gradients_are_the_explicit_ones(name):
    model, loss, x, y = case(name)
    rows = explicit(model, loss, x, y)
    vector = [torch.randn_like(p) for p in model.parameters()]
    weights = torch.randn(7, dtype=torch.float64)
    with collecting(model) as gradients:
        grads = gradients(loss(model(x), y), 7)
    with torch.no_grad():
        assert grads.batch_size == 7
        assert_close(grads.align(vector), rows @ flat(vector))
        assert_close(flat(grads.combine(weights)), weights @ rows)
        assert_close(grads.gram(), rows @ rows.T)
        assert_close(flat(grads.mean()), rows.mean(0))
        assert_close(torch.cat([t.flatten(1) for t in grads.dense()], 1), rows)
    assert all(p.grad is None for p in model.parameters())


def test_products_take_one_pass_and_are_kept(tmp_path):
    model, loss, x, y = case()
    loader = Counting(batches(x, y, 3))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader)
    assert loader.passes == 0
    matrix.trace(), matrix.trace()
    assert loader.passes == 1
    matrix @ torch.randn(matrix.shape[0], 4)
    assert loader.passes == 2
    matrix.spectrum(), matrix.rank(), matrix.largest_eigenvalue()
    assert loader.passes == 3


class Counting:
    """A loader that counts its passes, and may fail once at a given batch."""

    def __init__(self, loader, fail_at=None):
        self.loader, self.fail_at = loader, fail_at
        self.passes = self.given = 0

    def __iter__(self):
        self.passes += 1
        for batch in self.loader:
            if self.given == self.fail_at:
                raise KeyboardInterrupt
            self.given += 1
            yield batch

    def __len__(self):
        return len(self.loader)


def seen(model):
    """Counts the samples that a model is evaluated on for their gradients."""
    count = [0]

    def add(module, inputs):
        count[0] += len(inputs[0]) * torch.is_grad_enabled()

    model.register_forward_pre_hook(add)
    return count


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 4, 5, 8, 20])
def test_killed_and_resumed_equals_uninterrupted(fail_at, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(diffusion, "_EXACT", 3)
    model, loss, x, y = case(size=9)
    expected = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 4))
    expected = [expected.trace(), expected.spectrum(2), expected @ torch.ones(expected.shape[0]).double()]

    def run(loader):
        matrix = DiffusionMatrix.from_dataset(model, loss, loader, checkpoint=tmp_path / "run")
        return [matrix.trace(), matrix.spectrum(2), matrix @ torch.ones(matrix.shape[0]).double()]

    with pytest.raises(KeyboardInterrupt):
        run(Counting(batches(x, y, 4), fail_at))
    evaluated = seen(model)
    resumed = run(batches(x, y, 4))
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))
    first, evaluated[0] = evaluated[0], 0
    again = run(batches(x, y, 4))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert evaluated[0] == 4  # the first batch, to know the data
    passes = len(list((tmp_path / "run").glob("*.pt"))) - 1
    done = min(4 * fail_at, 9) if fail_at < 3 else 9 * (fail_at // 3) + 4 * (fail_at % 3)
    assert first == 9 * passes - done + 4 * (fail_at > 0)


def test_a_write_that_is_killed_leaves_the_old_content(tmp_path, monkeypatch):
    checkpoint = rgd_ext.checkpoint.Checkpoint(tmp_path / "folder", "me")
    checkpoint.save("result", {"state": torch.ones(2)})

    def torn(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save("result", {"state": torch.zeros(2)})
    assert checkpoint.load("result")["state"].all()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, loss, x, y = case()
    path = tmp_path / "run"
    DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=path).trace()
    for other in (batches(x + 1, y, 3), batches(x, 2 - y, 3), batches(x, y, 4)):
        with pytest.raises(ValueError, match="belongs to other data or another loss"):
            DiffusionMatrix.from_dataset(model, loss, other, checkpoint=path).trace()
    with pytest.raises(ValueError, match="belongs to other data or another loss"):
        DiffusionMatrix.from_dataset(
            model, nn.CrossEntropyLoss(label_smoothing=0.1), batches(x, y, 3), checkpoint=path
        ).trace()
    with torch.no_grad():
        model[0].bias += 1e-6
    with pytest.raises(ValueError, match="another model or other weights"):
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=tmp_path / "file")


def test_any_other_data_in_a_finished_checkpoint_is_refused(tmp_path):
    model, loss, x, y = case(size=9)
    path, vector = tmp_path / "run", torch.ones(sum(p.numel() for p in model.parameters())).double()
    first = DiffusionMatrix.from_dataset(model, loss, batches(x[:6], y[:6], 3), checkpoint=path)
    values = [first.trace(), first @ vector]
    changed = x[:6].clone()
    changed[5, 0] += 1e-6
    for other in ((x, y), (x[:3], y[:3]), (changed, y[:6])):  # more samples, fewer, and one that differs
        matrix = DiffusionMatrix.from_dataset(model, loss, batches(*other, 3), checkpoint=path)
        for call in (matrix.trace, lambda matrix=matrix: matrix @ vector):
            with pytest.raises(ValueError, match=r"run belongs to other data.*pass another path"):
                call()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x[:6], y[:6], 3), checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip([matrix.trace(), matrix @ vector], values, strict=True))


def test_a_checkpoint_and_a_loader_that_shuffles_do_not_agree(tmp_path):
    model, loss, x, y = case()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    for match in (None, r"belongs to other data.*batch \d differs.*the loader shuffles or augments"):
        matrix = DiffusionMatrix.from_dataset(model, loss, loader, checkpoint=tmp_path)
        if match is None:
            matrix.trace()
        else:
            with pytest.raises(ValueError, match=match):
                matrix.trace()


def test_other_data_in_an_unfinished_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_SAVE_EVERY", 0.0)
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, Counting(batches(x, y, 2), fail_at=2), checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        matrix.trace()
    changed = x.clone()
    changed[3] += 1
    for other in (changed, x[:2]):
        with pytest.raises(ValueError, match="belongs to other data"):
            DiffusionMatrix.from_dataset(model, loss, batches(other, y[: len(other)], 2), checkpoint=tmp_path).trace()
    changed = x.clone()
    changed[4] += 1  # not seen yet
    resumed = DiffusionMatrix.from_dataset(model, loss, batches(changed, y, 2), checkpoint=tmp_path)
    assert_close(resumed.trace(), DiffusionMatrix.from_batch(model, loss, changed, y).trace())


def test_products_of_other_data_than_the_moments_are_refused(tmp_path):
    model, loss, x, y = case()
    vector = torch.ones(sum(p.numel() for p in model.parameters())).double()
    DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=tmp_path) @ vector
    (tmp_path / "moments.pt").unlink()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x + 1, y, 3), checkpoint=tmp_path)
    matrix.trace()
    with pytest.raises(ValueError, match=r"product-\w+\.pt is of other data"):
        matrix @ vector


@pytest.mark.parametrize("content", [b"", b"half", bytes(100), slice(0, 200), slice(0, -1)], ids=range(5))
def test_a_damaged_checkpoint_file_is_named_with_the_remedy(content, tmp_path):
    model, loss, x, y = case()

    def trace():
        return DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=tmp_path).trace()

    expected = trace()
    for name in ("moments", "identity"):
        file = tmp_path / f"{name}.pt"
        whole = file.read_bytes()
        file.write_bytes(whole[content] if isinstance(content, slice) else content)
        with pytest.raises(ValueError, match=rf"{name}\.pt is damaged: delete it"):
            trace()
        file.unlink()
        if name == "moments":
            assert torch.equal(trace(), expected)
    with pytest.raises(ValueError, match="another model or other weights"):  # nobody knows whose the others are
        trace()


def test_a_loader_that_shuffles_is_noticed():
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True))
    with pytest.raises(RuntimeError, match=r"batch \d differs.*shuffle=False"):
        matrix @ torch.ones(matrix.shape[0])


class Noisy:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return ((x + 1e-3 * torch.randn_like(x), y) for x, y in self.loader)


def test_a_loader_that_augments_or_ends_early_is_noticed():
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, Noisy(batches(x, y, 3)))
    with pytest.raises(RuntimeError, match=r"batch 0 differs.*augments"):
        matrix @ torch.ones(matrix.shape[0])
    loader = list(batches(x, y, 3))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader)
    matrix.trace()
    last = loader.pop()
    with pytest.raises(RuntimeError, match="2 batches, but 3"):
        matrix.to_dense()
    loader += [last, last]
    with pytest.raises(RuntimeError, match="batch 3 differs"):
        matrix.to_dense()


def test_a_model_that_is_random_or_trained_meanwhile_is_noticed():
    _, loss, x, y = case()

    class Random(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5)

    matrix = DiffusionMatrix.from_dataset(Random(6, 3).double().eval(), loss, batches(x, y, 3))
    with pytest.raises(RuntimeError, match="random"):
        matrix @ torch.ones(matrix.shape[0])
    model = mlp().double().eval()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    matrix.trace()
    with torch.no_grad():
        model[0].weight += 1e-9
    with pytest.raises(RuntimeError, match="weights have changed"):
        matrix.to_dense()


def test_a_failed_pass_can_be_tried_again():
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, Counting(batches(x, y, 3), fail_at=1))
    with pytest.raises(KeyboardInterrupt):
        matrix.trace()
    matrix._source.loader.fail_at = None
    check(matrix, explicit(model, loss, x, y))


def test_progress_is_shown_on_a_terminal_and_changes_nothing(capsys, monkeypatch):
    model, loss, x, y = case()
    expected = DiffusionMatrix.from_batch(model, loss, x, y).trace()
    for is_terminal in (False, True):
        monkeypatch.setenv("FORCE_COLOR", "1" if is_terminal else "")
        matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), progress=True)
        assert_close(matrix.trace(), expected)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("pass 1 (moments)" in err) == is_terminal


def test_estimate_is_about_a_spectrum(monkeypatch):
    model, loss, x, y = case("CNN")
    batch = DiffusionMatrix.from_batch(model, loss, x, y).estimate()
    dense = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3)).estimate()
    monkeypatch.setattr(diffusion, "_EXACT", 3)
    iterated = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    d = iterated.shape[0]
    assert all(e.seconds > 0 for e in (batch, dense, iterated.estimate(5)))
    assert batch.bytes < dense.bytes
    assert dense.bytes >= 8 * d * d
    assert dense.passes == 2
    assert iterated.estimate(30).passes > iterated.estimate(5).passes >= 20
    assert iterated.estimate(5).bytes >= 20 * 8 * d


BAD = {
    "model": (lambda m, f, x, y: DiffusionMatrix.from_batch(None, f, x, y), TypeError, "NoneType"),
    "model, data set": (lambda m, f, x, y: DiffusionMatrix.from_dataset(3, f, [(x, y)]), TypeError, "int"),
    "training": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m.train(), f, [(x, y)]), ValueError, r"model\.eval"),
    "iterator": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m, f, iter([(x, y)])), TypeError, "only once"),
    "empty": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m, f, []).trace(), ValueError, "loader is empty"),
    "not a pair": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m, f, [x]).trace(), ValueError, "pairs"),
    "no samples": (lambda m, f, x, y: DiffusionMatrix.from_batch(m, f, x[:0], y[:0]), ValueError, "no samples"),
    "nan": (lambda m, f, x, y: DiffusionMatrix.from_batch(m, f, x * torch.nan, y), ValueError, "not finite"),
    "loss shape": (
        lambda m, f, x, y: DiffusionMatrix.from_batch(m, lambda o, y: o, x, y),
        ValueError,
        r"shape \(7, 3\)",
    ),
    "loss type": (lambda m, f, x, y: DiffusionMatrix.from_batch(m, lambda o, y: 1.0, x, y), TypeError, "float"),
    "merged": (
        lambda m, f, x, y: DiffusionMatrix.from_batch(nn.Sequential(m, nn.Flatten(0)), lambda o, y: o.sum(), x, y),
        ValueError,
        r"\(21,\).*dimension 0",
    ),
    "batch norm": (
        lambda m, f, x, y: DiffusionMatrix.from_batch(nn.Sequential(m, nn.BatchNorm1d(3).double()), f, x, y),
        ValueError,
        "convert_batch_norm",
    ),
    "correction": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2), correction=-1), ValueError, "-1"),
    "correction N": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2), correction=3), ValueError, "N = 3"),
    "shape": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ torch.ones(3), ValueError, r"\(3,\).*\(2, k\)"),
    "no columns": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ torch.ones(2, 0), ValueError, r"\(2, 0\)"),
    "dtype": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ torch.ones(2).long(), TypeError, "int64"),
    "array": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ [1.0, 2.0], TypeError, "linear_operator"),
    "list": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ [torch.ones(3)], ValueError, r"\[\(2,\)\]"),
    "k": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)).spectrum(3), ValueError, "from 1 to d = 2"),
    "k 0": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)).spectrum(0), ValueError, "k is 0"),
    "dense": (
        lambda m, f, x, y: DiffusionMatrix(torch.ones(2, 50_000)).to_dense(),
        ValueError,
        r"20000000000 bytes.*D @ v.*spectrum",
    ),
}


@pytest.mark.filterwarnings("ignore:.*its outputs are not finite")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(*case())
