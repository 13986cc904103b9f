"""torch.compile, torch.export and torch.jit work on captured models or on their copies, or say that they do not."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from capturing import captured_grad, double, expected_direction, layers, loss_of
from models import Net, mlp
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.(script|trace)",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # Dynamo asks for it, of any compiled function
)


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Dynamo keeps what it has found of code, such as that it has been compiled too often."""
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are, and counts how often."""

    def __init__(self):
        self.run = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.run += 1
            return graph.forward(*args)

        return run

    def taken(self):
        """How often graphs ran since this was asked before."""
        count, self.run = self.run, 0
        return count


def swish(x):
    return x * torch.sigmoid(1.5 * x)


def attend(x):
    weights = (x @ x.transpose(-1, -2) / 2).softmax(-1)
    return (weights @ x).tanh()


def with_function(function):
    """A model that calls a function between two layers."""
    return Net(lambda m, x: m.out(function(m.body(x))), **layers())


# By name: a function without parameters, and the shape of a sample that the model with it takes.
FUNCTIONS = {"activation": (swish, (5,)), "attention": (attend, (3, 5))}


def test_compiled_model_gives_the_same_direction():
    model, x = mlp().double(), double(5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        compiled = torch.compile(model, backend="aot_eager")
        loss_of(compiled(x)).backward()
    assert_close(flat_grad(model), expected)


def test_copies_are_exported_scripted_and_compiled_whole():
    model, x = mlp(), torch.randn(5, 6)
    expected = model(x)
    with rgd_ext.precondition(model):
        clone = copy.deepcopy(model)
    assert torch.equal(torch.export.export(clone, (x,)).module()(x), expected)
    assert torch.equal(torch.jit.script(clone)(x), expected)
    assert torch.equal(torch.compile(clone, fullgraph=True, backend="eager")(x), expected)


def test_a_captured_model_is_exported_and_traced_as_the_ordinary_model():
    model, x = mlp(), torch.randn(5, 6)
    expected = model(x)
    with rgd_ext.precondition(model) as handle:
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
        traced = torch.jit.trace(model, (x,))
        assert torch.equal(traced(x), expected)
        assert "detach" not in str(traced.graph)
        assert handle.stats is None


def test_a_captured_model_is_not_scripted_or_compiled_whole():
    model, x = mlp(), torch.randn(5, 6)
    with rgd_ext.precondition(model):
        with pytest.raises(TypeError, match=r"captured.*script\(copy\.deepcopy\(model\)\)"):
            torch.jit.script(model)
        with pytest.raises(RuntimeError, match=r"without fullgraph=True, or on a copy, copy\.deepcopy\(model\)"):
            torch.compile(model, fullgraph=True, backend="eager")(x)
        assert torch.jit.script(copy.deepcopy(model))(x).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_script_modules_are_refused():
    with pytest.raises(ValueError, match="ScriptModule"):
        rgd_ext.precondition(nn.Sequential(torch.jit.script(nn.Linear(4, 4))))


@pytest.mark.parametrize("policy", ["Spectral", "Rayleigh"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_without_parameters_stays_compiled_in_a_captured_model(kind, policy):
    function, shape = FUNCTIONS[kind]
    graphs = Graphs()
    model = with_function(torch.compile(function, fullgraph=True, backend=graphs)).double()
    ordinary = with_function(function).double()
    ordinary.load_state_dict(model.state_dict())
    with rgd_ext.precondition(model, epsilon=getattr(rgd_ext, policy)(0.5)):
        for size in (6, 6, 4, 6):
            x = double(size, *shape)
            model.zero_grad()
            output = model(x)
            assert graphs.taken() > 0
            loss_of(output).backward()
            assert_close(flat_grad(model), expected_direction(ordinary, x, policy=policy))


def test_a_module_without_parameters_stays_compiled_in_a_captured_model():
    graphs, x = Graphs(), double(5, 6)
    model = mlp().double()
    expected = expected_direction(model, x)
    model[1] = torch.compile(model[1], fullgraph=True, backend=graphs)
    with rgd_ext.precondition(model):
        model(x)  # the first forward is verified, which runs the graph as well
        graphs.taken()
        loss_of(model(x)).backward()
    assert graphs.taken() == 1
    assert_close(flat_grad(model), expected)


@pytest.mark.parametrize("policy", ["Spectral", "Rayleigh"])
def test_a_compiled_loss_gives_the_same_direction(policy):
    model, graphs, x = mlp().double(), Graphs(), double(5, 6)
    expected = expected_direction(model, x, policy=policy)
    loss = torch.compile(loss_of, fullgraph=True, backend=graphs)
    got = captured_grad(model, x, loss=loss, epsilon=getattr(rgd_ext, policy)(0.5))
    assert graphs.taken() == 1
    assert_close(got, expected)


def test_functions_compiled_with_their_backward_give_the_same_direction():
    x, loss = double(5, 5), torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    model = with_function(torch.compile(swish, fullgraph=True, backend="aot_eager")).double()
    ordinary = with_function(swish).double()
    ordinary.load_state_dict(model.state_dict())
    assert_close(captured_grad(model, x, loss=loss), expected_direction(ordinary, x))


def test_a_compiled_function_is_verified_in_a_model_that_draws_random_numbers():
    graphs, x = Graphs(), double(5, 6)
    model = nn.Sequential(mlp(), nn.Dropout(0.3)).double()
    model[0][1] = torch.compile(model[0][1], fullgraph=True, backend=graphs)
    with rgd_ext.precondition(model) as handle:
        for _ in range(2):
            loss_of(model(x)).backward()
            assert graphs.taken() == 1
    assert handle.stats.batch_size == 5


class Positions(nn.Module):
    """Positions that all samples share, in front of a function."""

    def __init__(self, function):
        super().__init__()
        self.positions, self.body, self.function = nn.Embedding(9, 4), nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.body(x), self.positions(torch.arange(x.shape[1])))


def add(x, positions):
    return (x + positions).tanh()


def test_a_compiled_function_of_a_shared_value_runs_uncompiled():
    graphs, x = Graphs(), double(5, 7, 4)
    model, ordinary = Positions(torch.compile(add, backend=graphs)).double(), Positions(add).double()
    ordinary.load_state_dict(model.state_dict())
    with rgd_ext.precondition(model):
        model(x)  # the verification compiles it for single samples
        graphs.taken()
        loss_of(model(x)).backward()
    assert graphs.taken() == 0
    assert_close(flat_grad(model), expected_direction(ordinary, x))


def test_a_function_of_a_shared_value_is_not_compiled_whole():
    model = Positions(torch.compile(add, fullgraph=True, backend="eager"))
    with rgd_ext.precondition(model), pytest.raises(RuntimeError, match=r"share.*without fullgraph=True"):
        model(torch.randn(5, 7, 4))


def test_what_a_function_does_when_it_is_compiled_is_verified():
    def centred(x):
        return x - x.mean(0) if torch.compiler.is_compiling() else x

    model = with_function(torch.compile(centred, fullgraph=True, backend="eager")).double()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="the forward mixes samples"):
        model(double(5, 5))


def test_verifications_in_several_threads_leave_the_compiler_on():
    def verify(_):
        model = nn.Sequential(mlp(), nn.Dropout(0.3))
        with rgd_ext.precondition(model):
            model(torch.randn(5, 6))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(verify, range(40)))
    graphs = Graphs()
    torch.compile(swish, backend=graphs)(torch.randn(3))
    assert graphs.taken() == 1


@pytest.mark.parametrize("draws", [False, True])
def test_a_compiled_function_that_mixes_samples_is_refused(draws):
    model = with_function(torch.compile(lambda x: x - x.mean(0), fullgraph=True, backend="eager")).double()
    if draws:
        model = nn.Sequential(model, nn.Dropout(0.3))
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="the forward mixes samples"):
        model(double(5, 5))


def test_a_compiled_model_may_be_captured_paused_and_released():
    model, graphs, x = mlp().double(), Graphs(), double(5, 6)
    expected = expected_direction(model, x)
    compiled = torch.compile(model, backend=graphs)
    loss_of(model(x)).backward()
    gradient = flat_grad(model).clone()

    def check(wanted):
        model.zero_grad()
        graphs.taken()
        loss_of(compiled(x)).backward()
        assert_close(flat_grad(model), wanted)

    check(gradient)
    for captured in (model, compiled):
        assert graphs.taken() == 1
        with rgd_ext.precondition(captured) as handle:
            assert rgd_ext.handle_of(compiled) is handle
            check(expected)
            assert graphs.taken() == 0
            with handle.paused():
                check(gradient)
            check(expected)
        check(gradient)
        torch._dynamo.reset()  # until then the code of the model counts as one that cannot be compiled
        check(gradient)
    assert graphs.taken() == 1
