"""What `GaussNewton` refuses: the message names it, the remedy helps, and nothing is changed."""

import copy
import pickle

import pytest
import torch
from fitting import flat, levenberg_marquardt, network, points
from torch import nn

import rgd_ext


def assert_refused(closure, model, kind, match, **options):
    optimizer = rgd_ext.GaussNewton(model, **options)
    before, state = flat(model.parameters()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(kind, match=match):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    assert optimizer.state_dict() == state
    assert optimizer.report is None
    assert all(p.grad is None for p in model.parameters())
    return optimizer


def assert_step_is_exact(optimizer, closure):
    """The optimizer is as good as new: adaptive=False, damping=1e-3."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = levenberg_marquardt(closure, parameters, 1e-3)
    optimizer.step(closure)
    assert (flat(parameters) - expected).abs().max() < 1e-10


def slope_without_graph(net, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).sum(), x)[0][:, 0]


_MIXED = r"other samples than their own"
# What a closure returns, given a network with one output and points; the error, and what the message says.
WRONG = {
    "a loss": (lambda net, x: net(x).square().mean(), ValueError, r"scalar, as a loss.*residuals of the samples"),
    "integers": (lambda net, x: (net(x) > 0).long()[:, 0], TypeError, r"int64: return differences"),
    "complex numbers": (lambda net, x: net(x).to(torch.complex128), TypeError, r"complex128.*view_as_real"),
    "a number": (lambda net, x: 1.0, TypeError, r"type float: return the residuals"),
    "nothing": (lambda net, x: None, TypeError, r"type NoneType"),
    "an empty tuple": (lambda net, x: (), ValueError, r"no residuals"),
    "a broadcast": (lambda net, x: net(x) - x[:, 0], ValueError, r"\(6, 6\), whose columns have equal gradients"),
    "a graph that is missing": (slope_without_graph, ValueError, r"no trainable parameter.*create_graph=True"),
    "no samples": (lambda net, x: net(x)[:0, 0], ValueError, r"without a residual"),
    "three dimensions": (lambda net, x: net(x)[None], ValueError, r"\(1, 6, 1\).*flatten\(1\)"),
    "a loss in a tuple": (lambda net, x: (net(x), net(x).mean()), ValueError, r"element 1 of what.*scalar"),
    "no gradient": (lambda net, x: net(x).detach()[:, 0], ValueError, r"no trainable parameter.*detach"),
    "another gradient": (lambda net, x: x.clone().requires_grad_()[:, 0], ValueError, r"no trainable parameter"),
    "a sum over pairs": (lambda net, x: net(x).view(3, 2).sum(1), ValueError, r"\(3,\) for 6 samples"),
    "samples behind": (lambda net, x: net(x).repeat(1, 2).T, ValueError, r"\(2, 6\) for 6 samples"),
    "outputs in a row": (lambda net, x: net(x).repeat(1, 2).flatten(), ValueError, r"\(12,\) for 6.*dimension 1"),
    "a mean over the batch": (lambda net, x: (net(x) - net(x).mean())[:, 0], ValueError, _MIXED),
    "neighbours": (lambda net, x: net(x)[:, 0] - net(x)[:, 0].roll(1), ValueError, _MIXED),
    "another order": (lambda net, x: net(x)[:, 0].flip(0), ValueError, r"other samples than their own.*order"),
    "a norm of all": (lambda net, x: net(x)[:, 0] / net(x).norm(), ValueError, _MIXED),
    "other numbers": (lambda net, x: net(x)[:, 0] + next(COUNTER), ValueError, r"other residuals when.*verify=False"),
    "infinite numbers": (lambda net, x: net(x)[:, 0] / (x[:, 0] - x[2, 0]), ValueError, r"residual 2 is -?inf"),
    "undefined numbers": (lambda net, x: (net(x)[:, 0] - 10).log(), ValueError, r"residual 0 is nan"),
    "an infinite slope": (lambda net, x: (net(x) - net(x).detach()).abs().sqrt(), ValueError, r"derivative of a resid"),
    "a backward": (lambda net, x: (net(x).sum().backward(), net(x))[1], RuntimeError, r"ran a backward.*create_graph"),
    "batches in one tensor": (lambda net, x: torch.cat([net(x), net(x[:4])]), ValueError, r"as a tuple, \(interior"),
}  # fmt: skip
COUNTER = iter(range(1000))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_residuals_are_refused(name, adaptive):
    wrong, kind, match = WRONG[name]
    net, x = network(), points(6)
    optimizer = assert_refused(lambda: wrong(net, x), net, kind, match, adaptive=adaptive)
    if not adaptive:
        assert_step_is_exact(optimizer, lambda: net(x)[:, 0] - 1)


def test_remedies_help():
    net, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(net, adaptive=False)
    assert_step_is_exact(optimizer, lambda: (net(x), net(x[:4])))
    assert_step_is_exact(optimizer, lambda: torch.view_as_real(net(x) * (1 + 2j)).flatten(1))
    assert_step_is_exact(optimizer, lambda: ((net(x) - net(x).detach())[:, 0].square() + 1e-3).sqrt())


def test_batch_normalisation_is_refused_in_training_mode():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match="BatchNorm"):
        rgd_ext.GaussNewton(net)
    rgd_ext.GaussNewton(net.eval(), adaptive=False).step(lambda: net(points(5)))


def test_more_residuals_than_max_rows():
    net, x = network(2, 3), points(6)
    optimizer = assert_refused(
        lambda: net(x), net, ValueError, r"18 residuals, and max_rows is 17.*max_rows=18", max_rows=17
    )
    rgd_ext.handle_of(net).remove()
    optimizer = rgd_ext.GaussNewton(net, max_rows=18, adaptive=False)
    assert_step_is_exact(optimizer, lambda: net(x))


def test_by_default_a_system_has_no_more_than_16_384_unknowns(monkeypatch):
    monkeypatch.setattr("rgd_ext.gauss_newton.evaluation._LARGEST_SYSTEM", 20)
    few, many = nn.Linear(2, 1).double(), nn.Linear(30, 1).double()
    rgd_ext.GaussNewton(few).step(lambda: few(points(100)) - 1)
    assert_refused(lambda: many(points(21, 30)), many, ValueError, r"21 residuals, and max_rows is 20")


def test_equal_samples_without_damping():
    net, x = network(), points(3).repeat(2, 1)
    y = torch.arange(6.0).double()
    optimizer = assert_refused(
        lambda: net(x)[:, 0] - y,
        net,
        RuntimeError,
        r"singular.*comes twice.*damping of at least",
        damping=0,
        adaptive=False,
    )
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(lambda: net(x)[:, 0] - y)
    optimizer.param_groups[0]["damping"] = float(str(caught.value).split()[-1])
    optimizer.step(lambda: net(x)[:, 0] - y)
    assert optimizer.report.jitter == 0


def test_equations_that_are_singular_but_have_a_solution_are_solved_with_jitter():
    net, x = network(), points(3).repeat(2, 1)
    optimizer = rgd_ext.GaussNewton(net, damping=0, adaptive=False)
    losses = [optimizer.step(lambda: net(x)[:, 0] - 1).item() for _ in range(3)]
    assert 0 < optimizer.report.jitter < 1e-10
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"lr": -1.0}, ValueError, r"lr=-1.0"),
        ({"lr": "fast"}, TypeError, r"lr='fast'"),
        ({"lr": float("nan")}, ValueError, r"lr=nan"),
        ({"damping": -1e-3}, ValueError, r"damping=-0.001"),
        ({"damping": 0.0}, ValueError, r"damping=0.*adaptive=False"),
        ({"damping": True}, TypeError, r"damping=True"),
        ({"weight_decay": -1}, ValueError, r"weight_decay=-1"),
        ({"momentum": 1.0, "adaptive": False}, ValueError, r"momentum=1.0.*below 1"),
        ({"momentum": 0.9}, ValueError, r"momentum=0.9.*adaptive=False"),
        ({"adaptive": 1}, TypeError, r"adaptive=1"),
        ({"geodesic": "yes"}, TypeError, r"geodesic='yes'"),
        ({"geodesic": True, "adaptive": False}, ValueError, r"geodesic=True.*adaptive=False"),
        ({"verify": None}, TypeError, r"verify=None"),
        ({"max_rows": 0}, ValueError, r"max_rows=0"),
        ({"max_rows": 1.5}, TypeError, r"max_rows=1.5"),
        ({"dtype": "float64"}, TypeError, r"dtype='float64'"),
        ({"dtype": torch.float16}, ValueError, r"dtype=torch.float16"),
        ({"memory_budget": -1}, ValueError, r"memory_budget"),
        ({"params": []}, ValueError, r"empty parameter list"),
        ({"params": [nn.Parameter(torch.ones(3))]}, ValueError, r"shape \(3,\).*no parameter of the model"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_captured(options, kind, match):
    net = network()
    with pytest.raises(kind, match=match):
        rgd_ext.GaussNewton(net, **options)
    assert rgd_ext.handle_of(net) is None


def test_groups_without_any_damping_beside_others():
    net, x = network(), points(5)
    groups = [{"params": net[0].parameters(), "damping": 0.0}, {"params": net[2].parameters()}]
    assert_refused(lambda: net(x), net, ValueError, r"parameter groups \[0\]", params=groups, adaptive=False)


def test_models_and_closures_that_are_none():
    with pytest.raises(TypeError, match="list"):
        rgd_ext.GaussNewton([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="trainable"):
        rgd_ext.GaussNewton(nn.Linear(2, 1).requires_grad_(False))
    net = network()
    with rgd_ext.precondition(network()).accumulate():
        pass  # from now on torch.optim calls a hook of ours before every step
    with pytest.raises(TypeError, match="closure is of type Tensor"):
        rgd_ext.GaussNewton(net).step(net(points(3)))


def test_a_model_that_is_captured_already():
    net = network()
    with rgd_ext.observe(net), pytest.raises(ValueError, match="captured already"):
        rgd_ext.GaussNewton(net)
    first = rgd_ext.GaussNewton(net)
    second = rgd_ext.GaussNewton(net)
    with pytest.raises(RuntimeError, match="newer optimizer"):
        first.step(lambda: net(points(3)))
    second.step(lambda: net(points(3)))
    rgd_ext.handle_of(net).remove()
    with pytest.raises(RuntimeError, match="was removed: make a new one"):
        second.step(lambda: net(points(3)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_refuses_to_step(copied):
    net, x = network(), points(5)
    twin = copied(rgd_ext.GaussNewton(net))
    assert twin.report is None
    with pytest.raises(RuntimeError, match=r"a copy.*GaussNewton\(model, ...\) for the copy"):
        twin.step(lambda: net(x))


class Noted(nn.Module):
    """Dropout, and a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.net, self.dropout = network(), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.dropout(self.net(x))


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_error_leaves_buffers_and_random_numbers_as_they_were(failing):
    model, x, calls = Noted(), points(6), []

    def closure():
        calls.append(1)
        residuals = model(x)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return residuals

    optimizer, before, state = rgd_ext.GaussNewton(model), flat(model.parameters()), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert torch.equal(flat(model.parameters()), before)


def test_a_trial_with_another_number_of_residuals():
    net, x, calls = network(), points(6), []

    def closure():
        calls.append(1)
        return net(x)[:, 0] if len(calls) < 3 else net(x)[:1, 0] * 0

    assert_refused(closure, net, ValueError, r"returned 6 residuals, and 1 when")


def test_mixing_that_shows_only_after_a_step_is_refused_then():
    net, x = network(), points(6)
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    optimizer = rgd_ext.GaussNewton(net)

    def closure():
        return net(x)[:, 0] * (1 + net(x).mean()) - 1

    optimizer.step(closure)
    with pytest.raises(ValueError, match=_MIXED):
        optimizer.step(closure)


def test_another_closure_and_another_number_of_samples_are_proven_anew():
    net, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(net)
    for _ in range(4):
        optimizer.step(lambda: net(x) - 1)
    with pytest.raises(ValueError, match=_MIXED):
        optimizer.step(lambda: net(x) - net(x).mean(0))

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(points(2, 1)), nn.Parameter(points(1, 1))

        def forward(self, x, q):
            return torch.sin(x @ self.w) * torch.cos(q @ self.v).mean()

    model, q = Shared(), points(5, 1)
    optimizer = rgd_ext.GaussNewton(model, adaptive=False)
    many, few = points(6), points(5)
    optimizer.step(lambda: model(many, q))
    with pytest.raises(ValueError, match=r"other residuals.*let the model keep samples apart"):
        optimizer.step(lambda: model(few, q))


@pytest.mark.parametrize("weight", [1.0, 1e3])
def test_mixing_beside_residuals_with_large_weights_is_refused(weight):
    net, x, border = network().float(), points(40).float(), points(5).float()
    assert_refused(lambda: ((net(x) - net(x).mean())[:, 0], weight * net(border)), net, ValueError, _MIXED)
