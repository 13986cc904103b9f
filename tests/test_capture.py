"""The capture as its users meet it: handles, copies, odd models, bad input."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
import torch.nn.functional as F
from capturing import Gain, captured_grad, double, loss_of
from models import GPT, Net, ViT, mlp
from oracle import assert_close, direction, flat, flat_grad, per_sample_gradients, weak_field
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rgd_ext
from rgd_ext.capture.planner import Planner


def check(model, *inputs):
    expected = weak_field(per_sample_gradients(model, loss_of, inputs))
    assert_close(captured_grad(model, *inputs), expected)


# Models


X = (6, 4)


RAW = {
    "bias (n,)": ((4,), lambda m, x: m.body(x) + m.p),
    "bias from the left": ((4,), lambda m, x: m.p + m.body(x)),
    "gain (1, n)": ((1, 4), lambda m, x: m.body(x) * m.p),
    "in place": ((1, 4), lambda m, x: m.body(x).add_(m.p)),
    "augmented assignment": ((4,), lambda m, x: _plus(m.body(x), m.p)),
    "matrix": ((4, 3), lambda m, x: m.body(x) @ m.p),
    "linear": ((3, 4), lambda m, x: F.linear(m.body(x), m.p)),
    "power": ((4,), lambda m, x: m.body(x).abs().add(1) ** m.p),
    "scalar": ((), lambda m, x: m.body(x) * m.p),
    "through its own functions": ((2, 4), lambda m, x: m.body(x) + torch.softmax(m.p, -1).mean(0)),
    "indexed": ((9, 4), lambda m, x: m.body(x) + m.p[2]),
    "looked up": ((9, 4), lambda m, x: m.body(x) + m.p[torch.tensor([1, 2])].sum(0)),
    "repeated": ((1, 4), lambda m, x: torch.cat([m.body(x), m.p.repeat(len(x), 1)], 1)),
    "expanded": ((4,), lambda m, x: torch.cat([m.body(x), m.p.expand(len(x), -1)], 1)),
    "expanded as": ((1, 4), lambda m, x: torch.cat([m.body(x), m.p.expand_as(x)], 1)),
    "through a module": ((1, 4), lambda m, x: m.body(x) + m.body(m.p)),
    "through a module, unbatched": ((4,), lambda m, x: m.body(x) + m.body(m.p).tanh()),
    "split": ((1, 8), lambda m, x: m.body(x) * m.p.chunk(2, 1)[0] + m.p.chunk(2, 1)[1]),
    "twice": ((4,), lambda m, x: (m.body(x) + m.p) * m.p),
    "unused": ((4,), lambda m, x: m.body(x)),
}


def _plus(x, p):
    x += p
    return x


@pytest.mark.parametrize("name", RAW)
def test_raw_parameters_of_a_container(name):
    shape, forward = RAW[name]
    model = Net(forward, body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(shape))).double()
    x = double(*X)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    if name == "unused":
        assert model.p.grad is None
        model.p.grad = torch.zeros_like(model.p)
    assert_close(flat_grad(model), expected)


def test_parameter_lists_belong_to_the_module_that_uses_them():
    parts = {"body": nn.Linear(4, 4), "biases": nn.ParameterList([torch.randn(4), torch.randn(1, 4)])}
    model = Net(lambda m, x: m.body(x) * m.biases[0] + m.biases[1], **parts).double()
    check(model, double(*X))


def test_one_parameter_in_two_modules_and_one_module_called_thrice():
    model = Net(lambda m, x: m.b(m.a(m.a(x).tanh()) + m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    check(model.double(), double(*X))


def test_embedding_tied_to_the_head():
    check(GPT().double(), torch.randint(11, (7, 9)))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_embedding_of_one_token_tied_to_the_head(shape):
    embed, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embed.weight
    check(Net(lambda m, x: m.head(m.embed(x).tanh()), embed=embed, head=head).double(), torch.randint(9, shape))


def test_tokens_and_positions_in_one_table():
    def forward(m, x):
        return m.table(x) + m.table(torch.arange(x.shape[1]))

    check(Net(forward, table=nn.Embedding(9, 4)).double(), torch.randint(9, (5, 3)))


def test_positions_through_dropout_free_layers_before_they_meet_the_batch():
    def forward(m, x):
        return m.table(x) + m.project(m.norm(m.positions(torch.arange(x.shape[1]))))

    parts = {"table": nn.Embedding(9, 4), "positions": nn.Embedding(3, 5)}
    parts |= {"norm": nn.LayerNorm(5), "project": nn.Linear(5, 4)}
    check(Net(forward, **parts).double(), torch.randint(9, (5, 3)))


def test_relative_positions():
    model, _ = relative_positions_as_long_as_the_batch()
    check(model.double(), torch.randint(9, (5, 3)))


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
    check(nn.Sequential(Whole(), nn.Linear(12, 2)).double(), double(*X))


def test_registered_rule_serves_its_type():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))
            self.calls = 0

        def forward(self, x):
            return torch.sigmoid(x * self.gain)  # saves its result for the backward

    def rule(module, inputs, output_grad):
        module.calls += 1
        slope = torch.sigmoid(inputs[0] * module.gain)
        return {"gain": output_grad * slope * (1 - slope) * inputs[0]}

    rgd_ext.register_rule(Squares, rule)
    model = nn.Sequential(nn.Linear(4, 4), Squares()).double()
    check(model, double(*X))
    assert model[1].calls == 1


def test_subclass_with_its_own_forward_is_not_taken_for_its_parent():
    class Doubled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 2, self.bias) * x

    check(nn.Sequential(nn.Linear(4, 4), Doubled(4, 4)).double(), double(*X))


@pytest.mark.parametrize(
    "bad", [{}, {"gain": torch.zeros(4)}, {"gain": None}], ids=["missing", "wrong shape", "nothing"]
)
def test_rule_with_a_wrong_answer_is_named(bad):
    class Wrong(Gain):
        pass

    rgd_ext.register_rule(Wrong, lambda module, inputs, output_grad: bad)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"rule for 'Wrong' returned"):
        captured_grad(Wrong(), torch.randn(*X))


def test_contributions_of_the_batch_before_are_noticed():
    class Stale(Gain):
        memory = None

    def rule(module, inputs, output_grad):
        module.memory = inputs[0] * output_grad if module.memory is None else module.memory
        return {"gain": module.memory}

    rgd_ext.register_rule(Stale, rule)
    model = Stale()
    with rgd_ext.precondition(model):
        for _ in range(2):
            model(torch.randn(6, 4)).sum().backward()
        with pytest.raises(ValueError, match=r"rule for 'Stale' returned contributions of shape \(6, 4\).*\(5, 4\)"):
            model(torch.randn(5, 4)).sum().backward()


def test_a_rule_may_return_another_dtype():
    class Rounded(Gain):
        pass

    rgd_ext.register_rule(Rounded, lambda module, inputs, output_grad: {"gain": (inputs[0] * output_grad).bfloat16()})
    x = torch.randn(*X)
    expected = captured_grad(Gain(), x)
    model = Rounded()
    with rgd_ext.precondition(model, verify=False):  # which would find the rounding
        for _ in range(3):
            model.zero_grad()
            loss_of(model(x)).backward()
            assert model.gain.grad.dtype == torch.float32
            torch.testing.assert_close(model.gain.grad, expected, rtol=0.05, atol=1e-2 * expected.norm().item())


@pytest.mark.parametrize(
    ("places", "memory_budget", "is_late"), [(1, None, True), (1, 1e6, False), (2000, None, False)]
)
def test_rules_of_small_layers_wait_for_the_end_of_the_backward(places, memory_budget, is_late):
    class Noted(Gain):
        pass

    events = []

    def rule(module, inputs, output_grad):
        events.append("rule")
        return {"gain": (inputs[0] * output_grad).sum(1)}

    rgd_ext.register_rule(Noted, rule)
    model = nn.Sequential(Noted(), nn.Tanh(), Noted())
    x = torch.randn(6, places, 4, requires_grad=True)
    expected = weak_field(per_sample_gradients(copy.deepcopy(model).double(), loss_of, [x.detach().double()]))
    x.register_hook(lambda grad: events.append("backward"))
    with rgd_ext.precondition(model, memory_budget=memory_budget, verify=False):
        loss_of(model(x)).backward()
    assert events == (["backward", "rule", "rule"] if is_late else ["rule", "rule", "backward"])
    assert_close(flat_grad(model).double(), expected, torch.float32)


def test_what_waits_is_forgotten_with_a_backward_that_fails():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double(), double(*X)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))

    def fail(grad):
        raise OverflowError

    with rgd_ext.precondition(model):
        output = model(x.requires_grad_())
        hook = x.register_hook(fail)
        with pytest.raises(OverflowError):
            (7 * loss_of(output)).backward()
        hook.remove()
        assert all(p.grad is None for p in model.parameters())
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)


def test_a_captured_model_that_nobody_holds_is_collected():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    handle = rgd_ext.precondition(model)
    loss_of(model(torch.randn(*X))).backward()
    references = [weakref.ref(held) for held in (model, handle, *model.parameters())]
    del model, handle
    gc.collect()
    assert all(reference() is None for reference in references)


def test_subclass_with_a_parameter_the_rule_does_not_know_is_named():
    class Gained(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.gain = nn.Parameter(torch.ones(3))

    for shape in ((6, 4), (6, 2, 4)):
        with pytest.raises(RuntimeError, match=r"rule for 'Gained' returned contributions for.*'gain'"):
            captured_grad(Gained(), torch.randn(*shape))


def test_nested_inputs_and_keyword_arguments():
    model = Net(lambda m, batch: m.body(input=batch["x"]) + batch["scale"], body=nn.Linear(4, 4)).double()
    x = double(*X)
    plain = Net(lambda m, x: m.body(x) + 2.0, body=copy.deepcopy(model.body))
    expected = weak_field(per_sample_gradients(plain, loss_of, [x]))
    assert_close(captured_grad(model, {"scale": torch.tensor(2.0), "x": x}), expected)


def test_two_captured_models_side_by_side():
    generator, critic = mlp().double(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = double(5, 6)
    whole = nn.Sequential(generator, critic)
    expected = per_sample_gradients(whole, loss_of, [x])
    first = sum(p.numel() for p in generator.parameters())
    with rgd_ext.precondition(generator), rgd_ext.precondition(critic):
        loss_of(critic(generator(x))).backward()
    assert_close(flat_grad(generator), weak_field(expected[:, :first]))
    assert_close(flat_grad(critic), weak_field(expected[:, first:]))


def test_samples_along_a_marked_dimension():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = double(6, 3, 4)
    expected = weak_field(per_sample_gradients(model, lambda out: out.sin().square().mean(), [x]))
    sequence_first = Net(lambda m, x: m.body(x.transpose(0, 1)).transpose(0, 1), body=model)
    with pytest.raises(ValueError, match=r"'body\.0' got an input of shape \(3, 6, 4\) in a batch of 6 samples.*mark"):
        captured_grad(sequence_first, x)
    for layer in (model[0], model[2]):
        rgd_ext.mark(layer, batch_dim=1)
    assert_close(captured_grad(sequence_first, x), expected)


# The handle


def test_gradients_accumulate_as_autograd_does():
    model, x = mlp(), torch.randn(5, 6)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
        once = flat_grad(model).clone()
        loss_of(model(x)).backward()
    assert torch.equal(flat_grad(model), 2 * once)


def test_accumulate_gives_the_direction_of_the_union():
    model = GPT().double()
    parts = [torch.randint(11, (3, 9)), torch.randint(11, (5, 7))]
    rows = [per_sample_gradients(model, lambda out: loss_of(out) * len(out), [x]) / len(x) for x in parts]
    expected = weak_field(torch.cat(rows) * 8)
    with rgd_ext.precondition(model) as handle:
        with handle.accumulate():
            for x in parts:
                (loss_of(model(x)) * len(x)).backward()
            assert model.head.weight.grad is None
        assert handle.stats.batch_size == 8
    missing = model.positions.weight.grad[7:]
    assert_close(flat_grad(model), expected)
    assert missing.abs().sum() > 0


def _raise_after(function):
    function()
    raise ZeroDivisionError


def test_accumulate_keeps_batches_that_came_in_one_buffer():
    model = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches, grads = torch.randint(11, (2, 6, 3)), torch.randn(2, 6, 3).double()
    directions = []
    x, grad = torch.empty_like(batches[0]), torch.empty_like(grads[0])
    for fill in (torch.Tensor.copy_, lambda buffer, values: values):
        model.zero_grad()
        with rgd_ext.precondition(model) as handle, handle.accumulate():
            for batch, of_output in zip(batches, grads, strict=True):
                model(fill(x, batch)).backward(fill(grad, of_output))
        directions.append(flat_grad(model))
    assert torch.equal(*directions)


def test_accumulate_writes_nothing_when_its_block_raises():
    model = mlp()
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(ZeroDivisionError), handle.accumulate():
            _raise_after(loss_of(model(torch.randn(5, 6))).backward)
        assert model[0].weight.grad is None
        with pytest.raises(RuntimeError, match="nested"), handle.accumulate(), handle.accumulate():
            pass


def test_spectral_every_takes_lambda_max_for_the_same_share_of_the_trace_in_between():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.LayerNorm(4)).double()
    handle = rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=3))
    exact = copy.deepcopy(model)
    reference = rgd_ext.precondition(exact, epsilon=rgd_ext.Spectral(0.5))
    shares = []
    for step in range(7):
        x, scale = torch.randn(6, 5, dtype=torch.float64), 10.0**step  # as a GradScaler changes it
        for captured in (model, exact):
            (scale * captured(x).square().sum()).backward()
        stats, want = handle.stats, reference.stats
        shares.append((stats.largest_eigenvalue / stats.trace).item())
        torch.testing.assert_close(stats.trace, want.trace)
        torch.testing.assert_close(stats.epsilon, 0.5 / stats.largest_eigenvalue)
        assert (stats.centred_gram is None) == (step % 3 != 0)
        if step % 3 == 0:
            torch.testing.assert_close(stats.largest_eigenvalue, want.largest_eigenvalue)
        else:
            assert shares[-1] == pytest.approx(shares[step - step % 3])


def test_spectral_every_goes_on_after_a_batch_that_overflowed():
    model = torch.nn.LayerNorm(4).double()
    handle = rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=2))
    x = torch.randn(6, 4, dtype=torch.float64)
    (float("inf") * model(x).square().sum()).backward()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(handle.stats.largest_eigenvalue, handle.stats.trace)  # the bound
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_remove_leaves_the_model_as_it_was_found():
    model, x = ViT(), torch.randn(3, 1, 8, 8)
    before = [dict(m.__dict__) for m in model.modules()]
    parameters = list(model.parameters())
    handle = rgd_ext.precondition(model)
    loss_of(model(x)).backward()
    handle.remove()
    assert before == [m.__dict__ for m in model.modules()]
    assert all(p is q and not p._backward_hooks for p, q in zip(parameters, model.parameters(), strict=True))
    sum(p.square().sum() for p in parameters).backward()
    model.zero_grad()
    loss_of(model(x)).backward()
    plain = flat_grad(model)
    rgd_ext.precondition(model).remove()
    model.zero_grad()
    loss_of(model(x)).backward()
    assert torch.equal(flat_grad(model), plain)


def test_paused_is_ordinary_autograd():
    model, x = mlp().double(), double(5, 6).requires_grad_()

    def penalty(model):
        (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
        return grad.square().sum()

    expected = torch.autograd.grad(penalty(model), list(model.parameters()), allow_unused=True)
    with rgd_ext.precondition(model) as handle, handle.paused():
        grads = torch.autograd.grad(penalty(model), list(model.parameters()), allow_unused=True)
        penalty(model).backward()
    for grad, other, parameter in zip(grads, expected, model.parameters(), strict=True):
        assert (grad is None and other is None) or torch.equal(grad, other)
        assert other is None or torch.equal(parameter.grad, other)


def test_autograd_grad_with_respect_to_parameters_names_paused():
    model = mlp()
    with rgd_ext.precondition(model):
        loss = loss_of(model(torch.randn(5, 6)))
        with pytest.raises(RuntimeError, match=r"paused\(\)"):
            torch.autograd.grad(loss, list(model.parameters()))
        assert model[0].weight.grad is None


def test_autograd_grad_with_respect_to_inputs_is_ordinary():
    model, x = mlp(), torch.randn(5, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(model(x)), x)
    with rgd_ext.precondition(model) as handle:
        (grad,) = torch.autograd.grad(loss_of(model(x)), x)
        assert handle.stats is None
    assert_close(grad, expected)
    assert model[0].weight.grad is None


def test_backward_to_some_parameters_only():
    model, x = mlp().double(), double(5, 6)
    frozen = copy.deepcopy(model)
    for parameter in frozen[:4].parameters():
        parameter.requires_grad_(False)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward(inputs=list(model[4].parameters()))
    assert model[0].weight.grad is None
    assert_close(flat([p.grad for p in model[4].parameters()]), captured_grad(frozen, x))


def test_a_union_may_take_another_way_than_its_batches(monkeypatch):
    def settle(self, name, factor, needs_gram, empty):
        return factor.settled("ghost" if factor.batch_size == 1 else "materialise", empty)

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x = double(5, 2, 4)
    expected = captured_grad(model, x)
    model.zero_grad()
    monkeypatch.setattr(Planner, "settle", settle)
    monkeypatch.setattr("rgd_ext.capture.small.SMALL", 0)
    with rgd_ext.precondition(model) as handle, handle.accumulate():
        for sample in x:
            loss_of(model(sample[None])).div(len(x)).backward()
    assert_close(flat_grad(model), expected)


def test_a_node_called_by_hand_is_refused():
    model = nn.Linear(4, 3)
    with rgd_ext.precondition(model):
        output = model(torch.randn(5, 4))
        with pytest.raises((RuntimeError, TypeError)):  # nodes in Python cannot be called at all
            output.grad_fn(torch.ones_like(output))


class Tagged(torch.Tensor):
    """A class of its own."""


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by forward_ad itself
def test_forward_mode_is_refused_and_works_paused():
    model, x = nn.Linear(3, 2).double(), double(4, 3)
    with rgd_ext.precondition(model) as handle, forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="paused"):
            model(dual)
        assert model(x).requires_grad
        with handle.paused():
            tangent = forward_ad.unpack_dual(model(dual)).tangent
    assert_close(tangent, model.weight.sum(1).expand(4, 2))


def test_classes_of_tensors_stay():
    model, x = mlp(), torch.randn(5, 6)
    expected = captured_grad(model, x)
    model.zero_grad()
    with rgd_ext.precondition(model):
        output = model(x.as_subclass(Tagged))
        loss_of(output.as_subclass(torch.Tensor)).backward()
    assert type(output) is Tagged
    assert_close(flat_grad(model), expected)


def test_linear_layers_that_change_from_backward_to_backward():
    # Layers with one vector per sample are planned together, and go to the products as they are while all stays.
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()

    def check_twice(batch_size):
        for _ in range(2):
            model.zero_grad()
            x = double(batch_size, 4).to(model[0].weight)
            expected = weak_field(per_sample_gradients(model, loss_of, (x,)))
            loss_of(model(x)).backward()
            assert_close(flat([p.grad for p in model.parameters() if p.requires_grad]), expected.to(x))
            assert [layer.name for layer in handle.plan().layers] == ["0", "2", "4", "5"]

    with rgd_ext.precondition(model) as handle:
        check_twice(5)
        check_twice(3)
        for frozen in (model[2].bias, model[2].weight):
            frozen.requires_grad_(False)
            check_twice(3)
            frozen.requires_grad_(True)
        check_twice(3)
        held = handle.plan().bytes
        check_twice(6)
        assert handle.plan().bytes == 2 * held
        model.float()
        check_twice(6)
        model.double()
        model[1] = model[0]  # called twice from now on
        check_twice(5)


def test_a_linear_layer_whose_weight_has_a_second_use_in_some_backwards():
    class Often(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.twice = nn.Linear(4, 4), False

        def forward(self, x):
            once = self.layer(x)
            return once + self.layer(once[:, None].expand(-1, 3, -1).tanh()).sum(1) if self.twice else once

    model = Often().double()
    with rgd_ext.precondition(model):
        for model.twice in (False, False, True, True, False):
            model.zero_grad()
            x = double(5, 4)
            loss_of(model(x)).backward()
            assert_close(flat_grad(model), weak_field(per_sample_gradients(model, loss_of, (x,))))


def squared_gradient_by_backward(model, x):
    loss_of(model(x)).backward(create_graph=True)
    return flat_grad(model).square().sum()


def squared_gradient_by_grad(model, x):
    grads = torch.autograd.grad(loss_of(model(x)), list(model.parameters()), create_graph=True)
    return flat(grads).square().sum()


def squared_gradient_of_inputs(model, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    return grad.square().sum()


PENALTIES = squared_gradient_by_backward, squared_gradient_by_grad, squared_gradient_of_inputs


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda f: f.__name__)
def test_second_derivatives_name_paused_and_work_there(penalty):
    model, x = mlp().double(), double(5, 6)
    plain = copy.deepcopy(model)
    penalty(plain, x).backward()
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(RuntimeError, match=r"(create_graph=True|autograd\.grad).*paused\(\)"):
            penalty(model, x).backward()
        assert all(p.grad is None for p in model.parameters())
        with handle.paused():
            penalty(model, x).backward()
    assert torch.equal(flat_grad(model), flat_grad(plain))


@pytest.mark.parametrize("layer", [0, 2])
def test_forward_keeps_its_signature_and_an_override_survives(layer):
    model = mlp()
    signature = inspect.signature(model.forward)
    calls = []
    forward = model[layer].forward
    model[layer].forward = lambda x: (calls.append(1), forward(x))[1]
    override = model[layer].forward
    with rgd_ext.precondition(model):
        assert inspect.signature(model.forward) == signature
        loss_of(model(torch.randn(5, 6))).backward()
    assert calls
    assert model[layer].forward is override


def test_nothing_is_recorded_without_gradients_or_inside_torch_func():
    model, x = mlp().double(), double(5, 6)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    with rgd_ext.precondition(model) as handle:
        with torch.no_grad():
            model(x)
        assert not model(x.clone()).detach().requires_grad

        def loss(parameters, x):
            return loss_of(torch.func.functional_call(model, parameters, (x[None],)))

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        loss_of(model(x)).backward()
        assert handle.stats.batch_size == 5
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    assert_close(flat_grad(model), direction(rows))


def test_a_failed_forward_or_backward_leaves_no_trace():
    model, x = mlp().double(), double(5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(double(5, 7))
        assert all(isinstance(p, nn.Parameter) for p in model[0]._parameters.values())
        output = model(x)
        output.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(output).backward()
        hidden = model[2](model[1](model[0](x)))
        hidden.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model[4](hidden)).backward()
        assert model[0].weight.grad is None
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)


def test_inputs_changed_in_place_are_noticed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with rgd_ext.precondition(model):
        hidden = model[0](torch.randn(5, 4))
        output = model[1](hidden)
        hidden.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(output).backward()


# Other people's machinery


def test_checkpointing():
    model, x = mlp().double(), double(5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    body = Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=model)
    assert_close(captured_grad(body, x), expected)


def test_reentrant_checkpointing_is_refused():
    model = Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=True), inner=mlp())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        captured_grad(model, torch.randn(5, 6, requires_grad=True))


def test_a_forward_inside_another_backward_is_refused():
    model, x, kept = nn.LayerNorm(4), torch.randn(5, 4, requires_grad=True), []

    def run(grad):
        with torch.enable_grad():
            kept.append(model(x))

    with rgd_ext.precondition(model):
        passed = x.clone()
        passed.register_hook(run)
        passed.sum().backward()
        with pytest.raises(RuntimeError, match="ran inside a backward"):
            (kept[0] + model(x)).sum().backward()


def test_autocast_and_grad_scaler():
    model, x = mlp(), torch.randn(16, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = rgd_ext.RGD(model, lr=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(x))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    error = (flat_grad(model) - expected).norm() / expected.norm()
    assert error < 0.05


def test_a_fixed_epsilon_under_a_grad_scaler():
    model, x = mlp().double(), double(16, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimizer = rgd_ext.RGD(model, lr=0.1, epsilon=rgd_ext.Fixed(20.0, loss_scale=scaler.get_scale))
    for scale in (2.0**10, 2.0**11):
        expected = weak_field(per_sample_gradients(model, loss_of, [x]), "Fixed", 20.0)
        optimizer.zero_grad()
        scaler.scale(loss_of(model(x))).backward()
        assert optimizer.preconditioner.stats.epsilon == 20.0 / scale**2
        scaler.unscale_(optimizer)
        assert_close(flat_grad(model), expected)
        scaler.step(optimizer)
        scaler.update()


def test_attention_under_autocast():
    model, x = Net(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(8, 2, batch_first=True)), None
    x = torch.randn(6, 5, 8)
    expected = captured_grad(copy.deepcopy(model), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad = captured_grad(model, x)
    assert (grad - expected).norm() / expected.norm() < 0.05


def test_backward_called_under_autocast_runs_rules_in_full_precision():
    class Product(nn.Linear):
        """Its rule multiplies by itself."""

    rgd_ext.register_rule(Product, lambda module, inputs, output_grad: {"weight": output_grad.mT @ inputs[0]})
    model, x = Product(6, 3, bias=False), torch.randn(16, 5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        loss = loss_of(model(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
    torch.testing.assert_close(flat_grad(model), expected)


@pytest.mark.parametrize("policy", [rgd_ext.Spectral, rgd_ext.Trace, rgd_ext.Rayleigh, rgd_ext.Fixed])
@pytest.mark.parametrize("inverse", ["weak-field", "exact"])
def test_overflow_flows_through(policy, inverse):
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = rgd_ext.RGD(model, lr=0.1, epsilon=policy(0.5), inverse=inverse)
    before = flat(model.parameters()).clone()
    scaler.scale(loss_of(model(torch.randn(5, 6))) * 1e6).backward()
    assert not torch.isfinite(flat_grad(model)).all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model.parameters()), before)
    assert scaler.get_scale() == 2.0**126


def test_compiled_model_gives_the_same_direction():
    model, x = mlp().double(), double(5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        compiled = torch.compile(model, backend="aot_eager")
        loss_of(compiled(x)).backward()
    assert_close(flat_grad(model), expected)


def test_bfloat16_model():
    model, x = mlp(), torch.randn(16, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    grad = captured_grad(model.bfloat16(), x.bfloat16())
    assert grad.dtype == torch.bfloat16
    assert (grad - expected).norm() / expected.norm() < 0.05


# Batch normalisation


class PerSampleBatchNorm(nn.Module):
    """Batch normalisation with one scale and shift per sample: what a contribution is the derivative of."""

    def __init__(self, weight, bias, batch):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().expand(batch, -1).clone())
        self.bias = nn.Parameter(bias.detach().expand(batch, -1).clone())

    def forward(self, x):
        return F.batch_norm(x, None, None, training=True) * self.weight[..., None] + self.bias[..., None]


def test_batch_norm_contributions_sum_to_the_gradient_and_are_exact():
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()).double(), double(5, 4, 3)
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 1.5)
        model[0].bias.uniform_(-1, 1)
    spread = nn.Sequential(PerSampleBatchNorm(model[0].weight, model[0].bias, 5), nn.Tanh())
    loss_of(spread(x)).backward()
    rows = torch.cat([spread[0].weight.grad, spread[0].bias.grad], 1) * 5
    assert_close(captured_grad(model, x, batch_norm="contribution"), direction(rows))


def test_batch_norm_in_training_mode_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\).*eval.*convert_batch_norm.*contribution"):
        rgd_ext.precondition(model)
    assert all("forward" not in m.__dict__ for m in model.modules())
    model.eval()
    with rgd_ext.precondition(model):
        model.train()
        with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\)"):
            model(torch.randn(3, 1, 5, 5))


def test_batch_norm_inside_a_unit_is_refused_whatever_the_mode():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gain = nn.BatchNorm1d(4, affine=False), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.norm(x) * self.gain

    with pytest.raises(ValueError, match=r"one sample|sample by sample"):
        captured_grad(Block(), torch.randn(*X), batch_norm="contribution")


# Bad input


def flattened_tokens():
    parts = {"table": nn.Embedding(9, 4), "head": nn.Linear(4, 4)}
    return Net(lambda m, x: m.head(m.table(x).flatten(0, 1)), **parts), torch.randint(9, (5, 3))


def child_weight():
    model = Net(lambda m, x: F.linear(m.a(x), m.b.weight), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    return model, torch.randn(*X)


def merged_windows():
    def forward(m, x):
        windows = m.body(x).view(len(x), 2, 2).flatten(0, 1)
        return (windows + m.table).view(len(x), -1)

    return Net(forward, body=nn.Linear(4, 4), table=nn.Parameter(torch.randn(2))), torch.randn(*X)


def mixed_samples():
    model = Net(lambda m, x: torch.cat([m.body(x), m.p]), body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(1, 4)))
    return model, torch.randn(*X)


def square_table():
    model = Net(lambda m, x: m.body(x) + m.p, body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(6, 4)))
    return model, torch.randn(*X)


def positions_as_long_as_the_batch():
    parts = {"table": nn.Embedding(9, 4), "positions": nn.Embedding(9, 4)}
    return Net(lambda m, x: m.table(x) + m.positions(torch.arange(x.shape[1])), **parts), torch.randint(9, (5, 5))


def relative_positions_as_long_as_the_batch():
    def forward(m, x):
        steps = torch.arange(x.shape[1])
        scores = m.table(x) @ m.table(x).transpose(1, 2)
        return scores + m.bias((steps[:, None] - steps).abs())[..., 0]

    return Net(forward, table=nn.Embedding(9, 4), bias=nn.Embedding(9, 1)), torch.randint(9, (5, 5))


AMBIGUOUS = [
    relative_positions_as_long_as_the_batch,
    flattened_tokens,
    merged_windows,
    mixed_samples,
    square_table,
    positions_as_long_as_the_batch,
]


@pytest.mark.parametrize("build", AMBIGUOUS, ids=lambda f: f.__name__)
def test_ambiguous_shapes_are_refused_with_the_way_to_mark_them(build):
    model, x = build()
    with pytest.raises(ValueError, match=r"rgd_ext\.(mark|unit)"):
        captured_grad(model, x)
    assert all(p.grad is None for p in model.parameters())


def test_a_mark_settles_positions_as_long_as_the_batch():
    model, x = positions_as_long_as_the_batch()
    rgd_ext.mark(model.positions, batch_dim=None)
    check(model.double(), x)


def test_gradient_outside_a_module_is_refused_by_parameter():
    model, x = child_weight()
    with pytest.raises(RuntimeError, match=r"parameter 'b\.weight' .* outside the forward of its module"):
        captured_grad(model, x)
    assert all(p.grad is None for p in model.parameters())


def test_penalty_on_weights_is_refused_and_works_paused():
    model, x = mlp(), torch.randn(5, 6)
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(RuntimeError, match="paused"):
            (loss_of(model(x)) + model[0].weight.square().sum()).backward()
        model.zero_grad()
        loss_of(model(x)).backward()
        before = model[0].weight.grad.clone()
        with handle.paused():
            model[0].weight.square().sum().backward()
    assert_close(model[0].weight.grad, before + 2 * model[0].weight.detach())


@pytest.mark.parametrize("build", [mlp, lambda: nn.LayerNorm(6)], ids=["mlp", "LayerNorm"])
def test_batch_sizes_that_disagree_in_one_backward(build):
    model = build()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"batch sizes disagree.*3 samples.*5"):
        (loss_of(model(torch.randn(3, 6))) + loss_of(model(torch.randn(5, 6)))).backward()


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), lambda: nn.LayerNorm(4)], ids=["Linear", "LayerNorm"])
def test_an_empty_batch_is_refused(build):
    model = build()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="empty batch"):
        model(torch.randn(0, 4)).sum().backward()
    assert model.weight.grad is None


def test_batch_sizes_that_disagree_between_modules():
    model = Net(lambda m, x: m.b(m.a(x)[:3]), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'b' got an input of shape \(3, 4\) in a batch of 6 samples"):
        captured_grad(model, torch.randn(*X))


def test_second_capture_is_refused():
    model = nn.Sequential(mlp(), nn.Linear(3, 3))
    with rgd_ext.precondition(model[0]), pytest.raises(ValueError, match=r"captured already.*handle_of.*remove"):
        rgd_ext.precondition(model)
    rgd_ext.precondition(model).remove()


BAD_CALLS = {
    "not a module": (lambda: rgd_ext.precondition([1]), TypeError, "list"),
    "no trainable parameters": (lambda: rgd_ext.precondition(mlp().requires_grad_(False)), ValueError, "no trainable"),
    "no parameters": (lambda: rgd_ext.precondition(nn.ReLU()), ValueError, "no trainable"),
    "lazy": (lambda: rgd_ext.precondition(nn.LazyLinear(3)), ValueError, "not initialised"),
    "batch_norm": (lambda: rgd_ext.precondition(mlp(), batch_norm="x"), ValueError, "'x'"),
    "inverse": (lambda: rgd_ext.precondition(mlp(), inverse="approximate"), ValueError, "'approximate'"),
    "epsilon": (lambda: rgd_ext.precondition(mlp(), epsilon="0.5"), TypeError, "'0.5'"),
    "epsilon nan": (lambda: rgd_ext.precondition(mlp(), epsilon=float("nan")), ValueError, "nan"),
    "epsilon class": (lambda: rgd_ext.precondition(mlp(), epsilon=rgd_ext.Rayleigh), TypeError, r"Spectral\(0\.5\)"),
    "fraction of no number": (lambda: rgd_ext.Spectral("a"), TypeError, "'a'"),
    "direction of nothing": (lambda: rgd_ext.direction(None), TypeError, "None"),
    "fraction": (lambda: rgd_ext.precondition(mlp(), epsilon=rgd_ext.Spectral(1.0)), ValueError, "fraction=1.0"),
    "batch_dim": (lambda: rgd_ext.precondition(mlp(), batch_dim="time"), TypeError, "'time'"),
    "negative batch_dim": (lambda: rgd_ext.precondition(mlp(), batch_dim=-1), ValueError, "-1"),
    "mark": (lambda: rgd_ext.mark(mlp(), "first"), TypeError, "'first'"),
    "mark module": (lambda: rgd_ext.mark(3, None), TypeError, "int"),
    "rule type": (lambda: rgd_ext.register_rule(mlp(), lambda *_: {}), TypeError, "Sequential"),
    "rule": (lambda: rgd_ext.register_rule(nn.Linear, None), TypeError, "None"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    call, error, match = BAD_CALLS[name]
    with pytest.raises(error, match=match):
        call()


def test_packed_sequences_are_refused():
    model = Net(lambda m, x: m.lstm(nn.utils.rnn.pack_sequence(list(x)))[1][0], lstm=nn.LSTM(4, 4))
    with pytest.raises(TypeError, match=r"PackedSequence.*pack_padded_sequence"):
        captured_grad(model, torch.randn(5, 3, 4))
