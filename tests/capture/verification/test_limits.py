"""Where a call cannot be proven, the reason is said once and training goes on; and what `rgd_ext.verify` reports."""

import re

import numpy
import pytest
import torch
import torch.nn.functional as F
from capturing import B, break_proofs, double, expected_direction, less_the_mean, loss_of
from models import Net, mlp, two_layers
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext


def test_an_argument_that_can_be_read_once_ends_the_proof_and_not_the_training():
    model = Net(lambda m, x, factors: m.a(x) * next(factors), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="iterator"):
        loss_of(model(torch.randn(B, 5), iter([2.0]))).backward()


def test_a_forward_that_refuses_a_second_call_trains_on():
    calls = []

    def forward(m, x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("one call at a time")
        return m.a(x)

    model = Net(forward, a=nn.Linear(5, 4)).double()
    x = double(B, 5)
    with rgd_ext.precondition(model) as handle:
        with pytest.warns(UserWarning, match=r"could not be verified.*one call at a time.*verify=False") as said:
            loss_of(model(x)).backward()
        del calls[:]
        expected = flat_grad(model)
        loss_of(model(x)).backward()
    assert len(said) == 1
    assert handle.stats.batch_size == B
    assert_close(flat_grad(model), 2 * expected)
    assert_close(expected, expected_direction(model.a, x))


def test_a_forward_that_cannot_be_called_twice_and_is_random_names_the_way_out():
    calls = []

    def forward(m, x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("one call at a time")
        return m.drop(m.a(x))

    model = Net(forward, a=nn.Linear(5, 4), drop=nn.Dropout(0.5))
    with rgd_ext.precondition(model), pytest.raises(RuntimeError, match=r"called only once.*pass verify=False"):
        model(torch.randn(B, 5))
    del calls[:]
    with rgd_ext.precondition(model, verify=False):
        assert (model(torch.randn(B, 5)) == 0).any()


def test_mixing_is_found_among_many_arguments():
    model = two_layers(lambda m, x, *others: m.b(m.a(x) + sum(others).mean(0)))
    with pytest.raises(ValueError, match="mixes samples"):
        rgd_ext.verify(model, torch.randn(B, 5), *torch.randn(60, B, 4))


def test_an_argument_that_cannot_be_copied_is_named_and_used_once():
    class Log:
        def __init__(self):
            self.entries = []

        def __deepcopy__(self, memo):
            raise RuntimeError("only one")

    model, log = Net(lambda m, x, log: log.entries.append(1) or m.a(x), a=nn.Linear(5, 4)), Log()
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match=r"an argument \(Log\) cannot be copied"):
        model(torch.randn(B, 5), log)
    assert log.entries == [1]


def test_every_reason_is_said_once():
    def forward(m, x, whole):
        z = m.a(x)
        return (z, z @ z.T) if whole else F.cross_entropy(z @ z.T, torch.arange(len(z)))

    model = Net(forward, a=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        with pytest.warns(UserWarning, match="could not be verified completely: outputs that have no part"):
            model(torch.randn(B, 5), True)
        with pytest.warns(UserWarning, match="could not be verified completely: the loss in the model"):
            model(torch.randn(B, 5), False)
        model(torch.randn(B - 1, 5), True)
        model(torch.randn(B - 1, 5), False)


@pytest.mark.parametrize("hooks", [False, True])
def test_a_proof_that_breaks_down_stops_no_training(hooks, monkeypatch):
    break_proofs(monkeypatch, NotImplementedError("no such tensor"), only_with_hooks=hooks)
    model, x = mlp(), torch.randn(B, 6)
    if hooks:
        model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    with rgd_ext.precondition(model) as handle:
        with pytest.warns(UserWarning, match="could not be verified: NotImplementedError: no such tensor"):
            output = model(x)
        loss_of(output).backward()
    assert handle.stats.batch_size == B


def test_random_numbers_from_elsewhere_are_no_error():
    model = Net(lambda m, x: m.a(x) * float(numpy.random.default_rng().random()), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="outputs change from call to call"):
        model(torch.randn(B, 5))


def test_numbers_that_are_not_finite_leave_the_next_call_to_be_proven():
    model, x = two_layers(less_the_mean), torch.randn(B, 5)
    with rgd_ext.precondition(model):
        with pytest.warns(UserWarning, match="not finite"):
            model(x * float("nan"))
        with pytest.raises(ValueError, match="mixes samples"):
            model(x)


def test_errors_of_the_forward_itself_come_through_and_leave_the_next_call_to_be_proven():
    model = two_layers(less_the_mean)
    with rgd_ext.precondition(model):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model(torch.randn(B, 7))
        with pytest.raises(ValueError, match="mixes samples"):
            model(torch.randn(B, 5))


def test_outputs_without_tensors_are_said_once():
    class Opaque:
        def __init__(self, logits):
            self.logits = logits

    model = Net(lambda m, x: Opaque(m.a(x)), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        with pytest.warns(UserWarning, match="no tensor among its outputs"):
            model(torch.randn(B, 5))
        loss_of(model(torch.randn(B + 1, 5)).logits).backward()
    with pytest.raises(RuntimeError, match="no tensor among its outputs"):
        rgd_ext.verify(model, torch.randn(B, 5))


def test_one_sample_proves_itself_and_no_samples_are_refused():
    verification = rgd_ext.verify(mlp(), torch.randn(1, 6))
    assert verification.samples == ()
    assert not verification.note
    with pytest.raises(RuntimeError, match="no samples"):
        rgd_ext.verify(mlp(), torch.randn(0, 6))


def test_the_report_prints_well():
    text = str(rgd_ext.verify(mlp(), torch.randn(B, 6)))
    assert re.fullmatch(
        r"verified: 6 parameters, samples 0 and 5 of 6 alone; largest relative error \d\.\de-\d\d"
        r" \('[\w.]+', tolerance 3e-03\); \d\.\d{3} s",
        text,
    )


def test_bad_arguments_of_verify_are_refused_by_their_value():
    with pytest.raises(TypeError, match="model is a str"):
        rgd_ext.verify("model", torch.randn(B, 6))
    with pytest.raises(TypeError, match="verify is 1"):
        rgd_ext.precondition(mlp(), verify=1)
    with pytest.raises(TypeError, match="RGD got verify with parameters"):
        rgd_ext.RGD(mlp().parameters(), lr=0.1, verify=False)
    with pytest.raises(ValueError, match=r"\(ModuleDict\) has no forward"):
        rgd_ext.verify(nn.ModuleDict({"a": nn.Linear(3, 2)}), torch.randn(B, 3))
    with rgd_ext.precondition(mlp()) as handle:
        with handle.paused(), pytest.raises(RuntimeError, match=r"leave `with handle\.paused\(\):`"):
            rgd_ext.verify(handle.model, torch.randn(B, 6))
        with torch.no_grad():
            assert rgd_ext.verify(handle.model, torch.randn(B, 6)).samples
        assert rgd_ext.verify(handle.model[0], torch.randn(B, 6)).parameters == 2
