"""The planner: which way each layer takes, within which memory, and that all ways give one direction."""

import gc
import json
import math
import weakref

import pytest
import torch
from capturing import loss_of
from models import MODELS, Net
from oracle import assert_close, direction, flat_grad, per_sample_gradients, weak_field
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rgd_ext
from rgd_ext import reference
from rgd_ext.__main__ import main
from rgd_ext.capture import rates as of_device
from rgd_ext.capture.cost import Cost, Rates
from rgd_ext.capture.embedding import Rows
from rgd_ext.capture.factors import Outer
from rgd_ext.capture.planner import Choice, Planner, fit
from rgd_ext.capture.workspace import Workspace

WAYS = ["ghost", "recompute", "materialise"]


class TiedGPT(nn.Module):
    """An embedding whose table is the weight of the head, beside one of many words, of which few are used."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.rare = nn.Embedding(5_000, 6)

    def forward(self, x):
        return self.head(self.mix(self.embed(x) + self.rare(x * 400)).tanh())


class Shapes(nn.Module):
    """Convolutions of several kinds, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1)
        self.twice = nn.Conv2d(6, 6, 3, 1, 2, 2)
        self.grouped = nn.Conv2d(6, 6, (1, 3), groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1)
        self.line = nn.Conv1d(4, 5, 3)

    def forward(self, x):
        x = self.grouped(self.twice(self.twice(self.first(x)).tanh()).tanh())
        return self.line(self.up(x.tanh()).flatten(2))


def model_and_inputs(name):
    if name == "tied":
        return TiedGPT().double(), [torch.randint(11, (6, 9))]
    if name == "convolutions":
        return Shapes().double(), [torch.randn(6, 3, 8, 8).double()]
    build, sample = MODELS[name]
    return build().double(), [x.double() if x.is_floating_point() else x for x in sample(6)]


@pytest.fixture
def only(monkeypatch):
    """Makes one way the choice wherever a layer has it, small layers included."""
    monkeypatch.setattr("rgd_ext.capture.small.SMALL", 0)

    def force(way):
        original = Choice.choose
        monkeypatch.setattr(
            Choice, "choose", lambda self, best, why: original(self, way if way in self.ways else best, why)
        )

    return force


@pytest.mark.parametrize("policy", ["Spectral", "Rayleigh", "exact"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["tied", "convolutions", "GPT", "ResNet", "LSTM classifier", "siamese"])
def test_every_way_gives_the_direction_of_the_oracle(name, way, policy, only):
    model, inputs = model_and_inputs(name)
    only(way)
    options = {"epsilon": rgd_ext.Rayleigh(0.5)} if policy == "Rayleigh" else {"epsilon": rgd_ext.Spectral(0.5)}
    options |= {"inverse": "exact"} if policy == "exact" else {}
    with rgd_ext.precondition(model, **options) as handle:
        loss_of(model(*inputs)).backward()
        assert way in {layer.way for layer in handle.plan().layers}
    grads = per_sample_gradients(model, loss_of, inputs)
    rayleigh = "Rayleigh" if policy == "Rayleigh" else "Spectral"
    small = grads.shape[1] < 3_000
    if policy != "exact":
        assert_close(flat_grad(model), weak_field(grads, rayleigh))
    elif small:
        assert_close(flat_grad(model), direction(grads, inverse="exact"))
    assert handle.stats.trace.item() == pytest.approx((grads - grads.mean(0)).square().sum(1).mean().item())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["tied", "convolutions"])
def test_matrix_vector_products_are_those_of_the_oracle_in_every_way(name, way, only):
    model, inputs = model_and_inputs(name)
    only(way)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    each = lambda output, y: output.sin().square().flatten(1).mean(1).mean()  # noqa: E731
    matrix = rgd_ext.DiffusionMatrix.from_batch(model, each, inputs[0], torch.zeros(6))
    grads = per_sample_gradients(model, loss_of, inputs)
    centred = grads - grads.mean(0)
    assert_close(matrix @ vector, centred.T @ (centred @ vector) / 6)


def choice(name, **ways):
    """A choice between ways of (seconds, bytes held)."""
    ways = {way: Cost(product=seconds, held=held) for way, (seconds, held) in ways.items()}
    return Choice(name, ways, Cost(), torch.device("cpu"), torch.float32, next(iter(ways)), "")


@pytest.fixture
def unit_rates(monkeypatch):
    monkeypatch.setattr("rgd_ext.capture.planner.rates", lambda device, dtype: Rates(1, 1, 1, 1, 1))


@pytest.mark.usefixtures("unit_rates")
def test_layers_that_save_most_bytes_per_second_give_way_to_the_budget():
    layers = [
        choice("cheap to shrink", materialise=(1, 100), recompute=(2, 20)),
        choice("dear to shrink", materialise=(1, 100), recompute=(50, 20)),
        choice("fast and small", materialise=(9, 100), recompute=(2, 20)),
        choice("no choice", materialise=(1, 10)),
    ]
    fit(layers, 230)
    assert [layer.way for layer in layers] == ["materialise", "materialise", "recompute", "materialise"]
    fit(layers, 229)
    assert [layer.way for layer in layers] == ["recompute", "materialise", "recompute", "materialise"]
    assert "memory_budget" in layers[0].why
    fit(layers, 70)
    assert [layer.way for layer in layers] == ["recompute", "recompute", "recompute", "materialise"]
    with pytest.raises(ValueError, match=r"memory_budget is 69 bytes.*memory_budget=70"):
        fit(layers, 69)


def test_costs_are_operations_and_bytes_over_rates():
    rates = Rates(product=10, convolution=20, gram=40, stream=5, calls=2)
    one, two = Cost(product=10, stream=5, held=3), Cost(convolution=40, gram=40, calls=4, held=4)
    assert one.seconds(rates) == 2
    assert (one + two).seconds(rates) == 2 + 2 + 1 + 2
    assert (one + two).held == 7


def held_bytes(factors):
    """Of the storages that the factors of a backward keep."""
    storages = {}
    for factor in factors.values():
        for tensor in vars(factor).values():
            for part in vars(tensor).values() if hasattr(tensor, "inputs") else [tensor]:
                if isinstance(part, torch.Tensor):
                    storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["ResNet", "GPT"])
def test_planned_bytes_are_those_held(name, way, only):
    model, inputs = model_and_inputs(name)
    only(way)
    with rgd_ext.precondition(model) as handle:
        planned = handle.plan(*inputs).bytes
        with handle.collect() as parts:
            loss_of(model(*inputs)).backward()
    assert planned == pytest.approx(held_bytes(parts[0]), rel=0.15)


def test_budget_is_kept_and_exact(monkeypatch):
    monkeypatch.setattr("rgd_ext.capture.planner.rates", lambda device, dtype: Rates(1, 1e-6, 1, 1, 1))
    model, inputs = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Tanh(), nn.Conv2d(40, 40, 3)), [torch.randn(16, 3, 8, 8)]
    expected = weak_field(per_sample_gradients(model, loss_of, inputs))
    with rgd_ext.precondition(model, memory_budget=math.inf) as handle:
        free = handle.plan(*inputs).bytes
    with rgd_ext.precondition(model, memory_budget=free // 2) as handle:
        assert handle.plan(*inputs).bytes <= free // 2
        for _ in range(3):
            model.zero_grad()
            loss_of(model(*inputs)).backward()
            assert handle.plan().bytes <= free // 2
            assert_close(flat_grad(model), expected, torch.float32)


@pytest.mark.parametrize(("budget", "ways"), [(None, ["materialise", "recompute"]), (math.inf, ["materialise"] * 2)])
def test_by_default_a_layer_holds_three_times_what_it_is_given(budget, ways, monkeypatch):
    # Products cost time, memory does not.
    monkeypatch.setattr("rgd_ext.capture.planner.rates", lambda device, dtype: Rates(1, 1, 1e9, 1e9, 1e9))
    narrow, wide = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 32, 3, padding=1, bias=False)
    model, inputs = nn.Sequential(narrow, nn.Tanh(), wide), [torch.randn(5, 3, 5, 5)]
    expected = weak_field(per_sample_gradients(model, loss_of, inputs))
    with rgd_ext.precondition(model, memory_budget=budget) as handle:
        loss_of(model(*inputs)).backward()
        assert [layer.way for layer in handle.plan().layers] == ways
    assert_close(flat_grad(model), expected, torch.float32)


@pytest.mark.parametrize(
    ("budget", "little", "number"),
    [(None, 1 << 20, 5), (math.inf, 1 << 20, 5), (None, 1 << 10, 0), (1_000_000, 1 << 20, 0)],
)
def test_little_memory_stays_between_steps_and_none_with_a_budget(budget, little, number, monkeypatch):
    monkeypatch.setattr("rgd_ext.capture.preconditioner.LITTLE", little)
    monkeypatch.setattr("rgd_ext.capture.small.SMALL", 0)
    monkeypatch.setattr("rgd_ext.capture.planner.rates", lambda device, dtype: Rates(1, 1, 1e9, 1e9, 1e9))
    model, x = nn.Sequential(*[nn.Linear(19, 19, bias=False) for _ in range(5)]), torch.randn(5, 13, 19)

    def stay():
        return sum(type(t) is torch.Tensor and t.shape == (5, 19, 19) for t in gc.get_objects())

    with rgd_ext.precondition(model, memory_budget=budget) as handle:
        for _ in range(3):
            loss_of(model(x)).backward()
            assert stay() == number
        assert {layer.way for layer in handle.plan().layers} == {"materialise"}
        with handle.accumulate():
            loss_of(model(x)).backward()
            loss_of(model(x)).backward()
        assert stay() == number


@pytest.mark.parametrize("places", [(), (3,)])
def test_inputs_and_output_gradients_are_let_go_of_as_they_are_spent(places, only, monkeypatch):
    # One vector per sample, or of each a product of its own.
    owner, name = (torch.ops.rgd_ext, "ghost_combine") if places == () else (Outer, "combine")
    seen, alive = [], []

    def counting(combine):
        def counted(*args):
            alive.append(sum(tensor() is not None for tensor in seen))
            return combine(*args)

        return counted

    def see(module, args, output):
        seen.append(weakref.ref(args[0]))
        output.register_hook(lambda grad: seen.append(weakref.ref(grad)))

    monkeypatch.setattr("rgd_ext.capture.planner.rates", lambda device, dtype: Rates(1, 1, 1, 1, 1))
    monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    monkeypatch.setattr(torch.ops.rgd_ext, "combine", counting(torch.ops.rgd_ext.combine))
    only("recompute")
    layers = [nn.Linear(300, 300, bias=False) for _ in range(3)]
    for layer in layers:
        layer.register_forward_hook(see)
    with rgd_ext.precondition(nn.Sequential(nn.LayerNorm(300), *layers), verify=False) as handle:
        for _ in range(2):
            loss_of(handle.model(torch.randn(128, *places, 300))).backward()
            assert alive == [6, 4, 2, 0]  # the last for the norm's, which are tensors
            assert len(seen) == 6
            seen.clear()
            alive.clear()


def test_another_dtype_is_planned_anew(monkeypatch):
    # The rates measured for two dtypes may favour two ways.
    monkeypatch.setattr("rgd_ext.capture.planner.rates", lambda device, dtype: Rates(1, 1, 1, 1, 1))
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(5, 3, 4, 4)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        single = handle.plan().bytes
        model.zero_grad()
        loss_of(model.double()(x.double())).backward()
        assert handle.plan().bytes == 2 * single


def test_known_shapes_that_come_together_anew_are_planned_within_the_budget():
    model = Net(lambda m, x, y: m.a(x).tanh().mean(1) + m.b(y).tanh().mean(1), a=nn.Linear(9, 9), b=nn.Linear(9, 9))
    short, long = torch.randn(8, 2, 9), torch.randn(8, 40, 9)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(long, long)).backward()
        least = handle.plan().bytes
    with rgd_ext.precondition(model, memory_budget=least - 1):
        loss_of(model(short, long)).backward()
        loss_of(model(long, short)).backward()
        with pytest.raises(ValueError, match=f"at least memory_budget={least}"):
            loss_of(model(long, long)).backward()


def test_a_budget_too_small_names_the_smallest_that_works_and_changes_nothing():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)), torch.randn(8, 3, 8, 8)
    with rgd_ext.precondition(model, memory_budget=100) as handle:
        for run in (lambda: loss_of(model(x)).backward(), lambda: handle.plan(x)):
            with pytest.raises(ValueError, match="memory_budget is 100 bytes") as caught:
                run()
        assert all(p.grad is None for p in model.parameters())
    least = int(str(caught.value).rpartition("memory_budget=")[2].partition(",")[0])
    for budget, works in ((least, True), (least - 1, False)):
        with rgd_ext.precondition(model, memory_budget=budget):
            if works:
                loss_of(model(x)).backward()
            else:
                with pytest.raises(ValueError, match=f"memory_budget={least}"):
                    loss_of(model(x)).backward()


@pytest.mark.parametrize(
    ("budget", "error"), [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1 GB", TypeError)]
)
def test_a_budget_is_a_positive_number_of_bytes(budget, error):
    with pytest.raises(error, match="memory_budget is"):
        rgd_ext.precondition(nn.Linear(2, 1), memory_budget=budget)
    with pytest.raises(error, match="memory_budget is"):
        rgd_ext.RGD(nn.Linear(2, 1), memory_budget=budget)


def test_planned_once_for_each_shape(monkeypatch):
    model, planned = nn.Conv2d(3, 4, 3), []
    original = Planner._chosen
    monkeypatch.setattr(Planner, "_chosen", lambda self, *args: planned.append(args[0]) or original(self, *args))
    with rgd_ext.precondition(model, verify=False):
        for batch, wanted in ((5, 2), (5, 2), (6, 4), (5, 4), (6, 4)):
            loss_of(model(torch.randn(batch, 3, 6, 6))).backward()
            assert len(planned) == wanted


def test_without_the_gramian_other_ways_may_be_faster(monkeypatch):
    # One in every three backwards needs it.
    monkeypatch.setattr("rgd_ext.capture.planner.rates", lambda device, dtype: Rates(1, 1, 1e-9, 1e9, 1e9))
    model, ways = nn.Linear(30, 20, bias=False), []
    with rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=3), memory_budget=math.inf) as handle:
        for _ in range(4):
            loss_of(model(torch.randn(5, 2, 30))).backward()
            ways.append(handle.plan().layers[0].way)
    assert ways == ["ghost", "materialise", "materialise", "ghost"]


def test_plan_leaves_model_gradients_and_random_numbers_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(6, 3, 8, 8)
    with rgd_ext.precondition(model, batch_norm="contribution") as handle:
        loss_of(model(x)).backward()
        stats, grad, buffers = handle.stats, flat_grad(model), [b.clone() for b in model.buffers()]
        state = torch.get_rng_state()
        plan = handle.plan(x)
        assert handle.stats is stats
        assert torch.equal(flat_grad(model), grad)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
        assert plan.layers == handle.plan().layers
    assert [layer.name for layer in plan.layers] == ["0", "1", "4"]
    assert plan.bytes == sum(layer.bytes for layer in plan.layers)
    assert plan.rgd_seconds > 0
    assert plan.sgd_seconds > 0
    table = str(plan).splitlines()
    assert table[0].split() == ["layer", "way", "ms", "MiB", "why"]
    assert table[1].split()[:2] == ["0", "materialise"]
    assert "SGD" in table[-1]


def test_plan_leaves_policies_and_collected_backwards_alone():
    model, x, asked = nn.Conv2d(1, 2, 3), torch.randn(4, 1, 9, 9), []
    with rgd_ext.precondition(model, epsilon=lambda stats: asked.append(stats) or 0.1) as handle:
        with handle.collect() as parts:
            handle.plan(x)
        assert (asked, parts) == ([], [])
    with rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=2)) as handle:
        for wanted in (True, False, True):
            handle.plan(x)
            loss_of(model(x)).backward()
            assert (handle.stats.centred_gram is not None) == wanted


def test_plan_needs_a_backward_or_a_batch():
    model = nn.Linear(3, 2)
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(RuntimeError, match="no backward yet"):
            handle.plan()
        with handle.paused(), pytest.raises(RuntimeError, match="records nothing"):
            handle.plan(torch.randn(4, 3))
        with pytest.raises(ValueError, match="no output"):
            rgd_ext.precondition(Detached()).plan(torch.randn(4, 3))


class Detached(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return super().forward(x).detach()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


def test_an_embedding_of_128k_words_makes_nothing_larger_than_its_table():
    model, x = nn.Embedding(128_000, 8), torch.randint(128_000, (64, 512))
    with rgd_ext.precondition(model), Largest() as largest:
        model(x).square().mean().backward()
    assert largest.elements <= max(model.weight.numel(), reference.block_elements(x.device))


@pytest.mark.parametrize("products", [1, 50, 1 << 20])
def test_gramian_of_an_embedding_whose_rows_are_shared_by_few_or_all(products, monkeypatch):
    monkeypatch.setattr(Rows, "_PRODUCTS", products)
    indices = torch.randint(40, (7, 12)).clamp(min=25)
    indices[:, 0], indices[2] = 3, 4
    factor = Rows.of_sequences(indices, torch.randn(7, 12, 5), torch.Size((40, 5)))
    explicit = factor.dense().flatten(1)
    assert_close(factor.gram(), explicit @ explicit.T)


def test_a_tied_table_is_formed_in_blocks(only, monkeypatch):
    monkeypatch.setattr("rgd_ext.capture.factors.block_elements", lambda device: 500)
    model, (x,) = model_and_inputs("tied")
    only("recompute")
    with rgd_ext.precondition(model), Largest() as largest:
        loss_of(model(x)).backward()
    # One sample has 5,000 rows of 6; the six of them would have 180,000 elements.
    assert largest.elements <= 30_000


def test_memory_is_used_again_by_the_next_backward():
    workspace, like = Workspace(), torch.empty(0, dtype=torch.float32)
    one, two = workspace.empty((2, 3), like), workspace.empty((4,), like)
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
    workspace.restart()
    again, larger = workspace.empty((6,), like), workspace.empty((5,), like)
    assert again.data_ptr() == one.data_ptr()
    assert larger.shape == (5,)
    assert larger.untyped_storage().nbytes() == 20


def test_collected_gradients_outlive_later_backwards():
    model, x = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 6, 6)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        with handle.collect() as parts:
            loss_of(model(x)).backward()
        collected = {p: factor.dense() for p, factor in parts[0].items()}
        before = {p: tensor.clone() for p, tensor in collected.items()}
        loss_of(model(2 * x)).backward()
    assert all(torch.equal(tensor, before[p]) for p, tensor in collected.items())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A file of rates of its own, and how often they are measured."""
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(of_device, "_measured", lambda *device: measured.append(device) or Rates(1, 2, 3, 4, 5))
    return tmp_path / "rgd_ext" / "rates.json", measured


def rates():
    """As a new process finds them."""
    of_device.rates.cache_clear()
    return of_device.rates(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def _forget_rates():
    yield
    of_device.rates.cache_clear()


def test_rates_are_measured_once_and_kept(cache):
    path, measured = cache
    assert rates() == rates() == Rates(1, 2, 3, 4, 5)
    assert len(measured) == 1
    assert len(json.loads(path.read_text())) == 1
    assert [file.name for file in path.parent.iterdir()] == ["rates.json"]
    of_device.rates(torch.device("cpu"), torch.float64)
    assert len(measured) == 2
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[1]", '{"key": {"product": 1}}', '{"key": 3}', "not json"])
def test_a_file_that_is_not_one_of_rates_is_written_anew(cache, content):
    path, measured = cache
    path.parent.mkdir()
    path.write_text(content)
    assert rates() == rates()
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_does_no_harm(cache):
    path, measured = cache
    path.parent.write_text("a file in the place of the folder")
    assert rates() == rates()
    assert len(measured) == 2


def test_rates_are_measured_for_a_user_without_a_home(cache, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(of_device.Path, "home", homeless)
    assert rates() == Rates(1, 2, 3, 4, 5)


@pytest.mark.parametrize("change", ["version", "kernels"])
def test_rates_that_were_measured_otherwise_are_measured_again(change, cache, monkeypatch):
    _, measured = cache
    rates()
    if change == "version":
        monkeypatch.setattr(of_device, "_VERSION", of_device._VERSION + 1)
    else:
        compiled = not rgd_ext.build_info()["compiled"]
        monkeypatch.setattr(of_device, "build_info", lambda: {"compiled": compiled})
    rates()
    assert len(measured) == 2


class FakeDevice(TorchDispatchMode):
    """A device that computes nothing, in a time: calls take the host `LAUNCH` seconds, and return at once."""

    LAUNCH, WAIT = 5e-6, 1e-5

    def __init__(self, rates):
        super().__init__()
        self.rates, self.host, self.ready = rates, 0.0, 0.0

    def now(self, devices):
        self.host = max(self.host, self.ready) + self.WAIT
        return self.host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.name().partition("::")[2]
        self.host += self.LAUNCH
        self.ready = max(self.ready, self.host) + self.work(name, args).seconds(self.rates)
        return result

    def work(self, name, args):
        if name == "mm.out":
            return Cost(product=2 * args[0].numel() * args[1].shape[1])
        if name == "conv_weight_grads":
            return Cost(convolution=2 * args[0].numel() * args[1].shape[1] * math.prod(args[2]))
        if name not in ("combine", "gram"):
            return Cost()
        (grads,) = args[0]
        return Cost(stream=grads.nbytes, gram=len(grads) * grads.numel() * (name == "gram"))


@pytest.mark.parametrize(
    ("dtype", "rates"),
    [
        (torch.float32, Rates(5e13, 2e12, 1.5e13, 3e12, 1 / FakeDevice.LAUNCH)),
        (torch.bfloat16, Rates(7e14, 5e12, 1e14, 4.3e12, 1 / FakeDevice.LAUNCH)),
    ],
    ids=str,
)
def test_measured_rates_are_those_of_a_device_that_works_while_the_host_goes_on(dtype, rates):
    with FakeDevice(rates) as device, Largest() as largest:
        found = of_device._measured(torch.device("meta"), dtype, device.now)
    assert vars(found) == pytest.approx(vars(rates), rel=0.1)
    assert device.now([]) < 0.3
    assert dtype.itemsize * largest.elements <= 256 << 20


@pytest.mark.usefixtures("cache")
def test_rates_asked_for_among_fake_tensors_are_of_real_ones(monkeypatch):
    seen = []
    monkeypatch.setattr(of_device, "_measured", lambda *_: seen.append(type(torch.ones(1))) or Rates(1, 2, 3, 4, 5))
    with FakeTensorMode():
        rates()
    assert seen == [torch.Tensor]


def test_rates_of_meta_tensors_are_not_those_of_the_cpu(cache):
    _, measured = cache
    rates()
    of_device.rates(torch.device("meta"), torch.float32)
    assert len(measured) == 2


def test_measured_rates_are_positive_numbers():
    found = of_device._measured(torch.device("cpu"), torch.float32)
    assert all(0 < rate < 1e16 for rate in vars(found).values())


SOURCE = """
import torch

def model():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))

def both():
    return model(), torch.randn(5, 3, 8, 8), torch.zeros(5)

def batch():
    return torch.randn(5, 3, 8, 8), torch.zeros(5)

def loader():
    return [batch(), batch()]

def empty():
    return []

def named():
    return {"input": torch.randn(5, 3, 8, 8)},

def wrong():
    return 3, 4
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"planned_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return name


@pytest.mark.parametrize("data", [None, "batch", "loader", "named"])
def test_command_prints_the_plan(mine, data, capsys):
    arguments = ["plan", f"{mine}:model", "--data", f"{mine}:{data}"] if data else ["plan", f"{mine}:both"]
    assert main([*arguments, "--policy", "rayleigh", "--memory-budget", "1000000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "2", "total:", "measured:"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "without a batch"),
        (["wrong"], "starts with a int"),
        (["model", "--data", "empty"], "without batches"),
        (["both", "--memory-budget", "10"], "at least memory_budget="),
        (["missing"], "missing"),
    ],
)
def test_command_says_what_is_wrong(mine, arguments, message, capsys):
    arguments = [f"{mine}:{a}" if a.isalpha() and a in SOURCE + "missing" else a for a in arguments]
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err
