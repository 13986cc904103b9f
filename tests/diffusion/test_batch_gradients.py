"""Gradients of one batch: models that couple samples are refused, and a model is left as it was found."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusing import CASES, batches, case, contrastive, explicit
from oracle import assert_close, flat
from torch import nn

import rgd_ext
from rgd_ext import DiffusionMatrix
from rgd_ext.capture.captured_gradients import collecting

pytestmark = pytest.mark.usefixtures("one_thread")


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
    # A single sample cannot show that samples are coupled.
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


class Untouched:
    """A model, and all of its state that an evaluation of its gradients might change, to compare before and after."""

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
        DiffusionMatrix.from_batch(found.model, contrastive, found.x, found.y)
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
