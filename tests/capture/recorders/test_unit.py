"""Modules that run as one function under torch.func.vmap are exact, and those that couple samples are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from capturing import B, Gain, assert_exact, double, loss_of
from models import Net
from torch import nn

import rgd_ext

T, N, M = 3, 4, 6


def test_unit_takes_a_container_as_one_function():
    class Whole(nn.Module):
        """Uses a child's weight through @, and merges the batch with another dimension."""

        def __init__(self):
            super().__init__()
            self.child, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            heads = (x[:, None] + self.table).flatten(0, 1) @ self.child.weight + self.child(x).repeat_interleave(3, 0)
            return heads.view(len(x), -1)

    rgd_ext.register_rule(Whole, rgd_ext.unit)
    assert_exact(nn.Sequential(Whole(), nn.Linear(12, 2)), double(6, 4))


def test_subclass_with_its_own_forward_is_not_taken_for_its_parent():
    class Doubled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 2, self.bias) * x

    assert_exact(nn.Sequential(nn.Linear(4, 4), Doubled(4, 4)), double(6, 4))


def test_a_layer_with_its_own_forward_is_served_as_the_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 2, self.bias)

    assert_exact(nn.Sequential(Doubled(N, M), nn.Tanh(), Doubled(M, N)), double(B, T, N))


@pytest.mark.parametrize("padding", [0, -1])
def test_padding_of_an_embedding_in_a_unit_gets_no_gradient(padding):
    class Doubled(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 2

    x = torch.randint(10, (B, 4))
    x[:, 1] = padding % 10
    assert_exact(nn.Sequential(Doubled(10, 4, padding_idx=padding), nn.Linear(4, 3)), x)


def test_unused_parameters_of_a_unit_get_no_gradient():
    class Unused(Gain):
        def forward(self, x):
            return x * 2

    model, x = Unused(), torch.randn(6, 4, requires_grad=True)
    assert rgd_ext.precondition(model).stats is None
    loss_of(model(x)).backward()
    assert model.gain.grad is None
    assert x.grad is not None


def test_module_that_couples_samples_is_refused():
    class Standardise(Gain):
        def forward(self, x):
            return (x - x.mean(0)) * self.gain

    model = nn.Sequential(nn.Linear(4, 4), Standardise())
    with rgd_ext.precondition(model):
        model(torch.randn(1, 4))  # one sample shows nothing
        for _ in range(2):
            with pytest.raises(ValueError, match=r"\(Standardise\).*couples the samples"):
                model(torch.randn(6, 4))


def test_module_that_couples_samples_and_draws_random_numbers_is_refused():
    class Noisy(Gain):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training) * self.gain - x.mean()

    model, x = nn.Sequential(nn.Linear(4, 4), Noisy()), torch.randn(6, 4)
    with rgd_ext.precondition(model):
        for is_training in (True, False):
            model.train(is_training)
            with pytest.raises(ValueError, match=r"\(Noisy\).*couples the samples"):
                model(x)


class Average(Gain):
    """Keeps an average of what it saw, and counts."""

    def __init__(self, of_input):
        super().__init__()
        self.of_input = of_input
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        if self.of_input:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return super().forward(x)


def test_a_unit_may_count_its_calls_and_not_average_its_inputs():
    model, x = nn.Sequential(nn.Linear(4, 4), Average(of_input=False)), torch.randn(6, 4)
    with rgd_ext.precondition(model):
        for _ in range(3):
            model(x)
    assert model[1].count == 3
    model = nn.Sequential(nn.Linear(4, 4), Average(of_input=True))
    buffers = dict(model[1]._buffers)
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"'1', .* gives 'average'.*register_rule"):
        model(x)
    assert all(model[1]._buffers[name] is buffer for name, buffer in buffers.items())


def test_random_numbers_of_a_value_are_the_same_for_all_samples():
    model, x = Net(lambda m, x: x * F.dropout(m.w, 0.5), w=nn.Parameter(torch.ones(400))), torch.ones(B, 400)
    with rgd_ext.precondition(model):
        output = model(x)
    assert 0 < output[0].count_nonzero() < 400
    assert torch.equal(output, output[:1].expand(B, -1))


@pytest.mark.parametrize(
    "change", ["weight.mul_(2)", "weight[0] = 1", "weight.data.T.add_(1)", "weight.detach().neg_()"]
)
def test_parameters_that_a_unit_changes_in_place_change_once(change):
    class Changing(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                exec(f"self.{change}")
            return F.linear(x, self.weight)

    model = Changing(N, M, bias=False)
    plain = copy.deepcopy(model)
    plain(torch.randn(B, N))
    warned = pytest.warns(UserWarning, match="changes a parameter in place")
    with rgd_ext.precondition(model, verify=False), warned:
        model(torch.randn(B, N))
    assert torch.equal(model.weight, plain.weight)
