"""What the tests of the planner have in common, and all of its internals that tests reach into."""

import torch
from capturing import without_small_layers
from models import MODELS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rgd_ext.contributions.cost import Cost, Rates
from rgd_ext.planning.planner import Choice, Planner, fit

STRATEGIES = ["ghost", "recompute", "materialise"]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


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


class TiedGPT(nn.Module):
    """An embedding whose table is the weight of the head, beside one of many words, of which few are used."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.rare = nn.Embedding(5_000, 6)

    def forward(self, x):
        return self.head(self.mix(self.embed(x) + self.rare(x * 400)).tanh())


def model_and_inputs(name):
    """A model of the catalogue, or one above, and a batch of 6 samples, in float64."""
    if name == "tied":
        return TiedGPT().double(), [torch.randint(11, (6, 9))]
    if name == "convolutions":
        return Shapes().double(), [torch.randn(6, 3, 8, 8).double()]
    build, sample = MODELS[name]
    return build().double(), [x.double() if x.is_floating_point() else x for x in sample(6)]


def with_rates(monkeypatch, product=1, convolution=1, gram=1, stream=1, calls=1):
    """The planner takes these for the rates of every device and dtype."""
    rates = Rates(product, convolution, gram, stream, calls)
    monkeypatch.setattr("rgd_ext.planning.planner.rates", lambda device, dtype: rates)


def only_strategy(monkeypatch, strategy):
    """Every layer that has this strategy takes it, small layers included."""
    without_small_layers(monkeypatch)
    choose = Choice.choose
    monkeypatch.setattr(
        Choice, "choose", lambda self, best, why: choose(self, strategy if strategy in self.strategies else best, why)
    )


def with_strategies(monkeypatch, strategy_of):
    """Contributions take the strategy that `strategy_of` gives them; returns a list of those that were taken."""
    taken = []

    def apply(self, name, factor, needs_gram, empty):
        self.note(name, factor, needs_gram)
        taken.append(strategy_of(factor))
        return factor.apply(taken[-1], empty)

    monkeypatch.setattr(Planner, "apply", apply)
    return taken


def counted_plans(monkeypatch):
    """A list that grows by one with every layer that is planned."""
    planned, chosen = [], Planner._chosen
    monkeypatch.setattr(Planner, "_chosen", lambda self, *args: planned.append(args[0]) or chosen(self, *args))
    return planned


def strategies(handle):
    """The strategy of each layer in the last backward, by the layer's name."""
    return {layer.name: layer.way for layer in handle.plan().layers}


def reasons(handle):
    """The strategy of each layer in the last backward, and why it was chosen, by the layer's name."""
    return {layer.name: f"{layer.way}: {layer.why}" for layer in handle.plan().layers}


def choice(name, **strategies):
    """A choice between strategies of (seconds, bytes held)."""
    costs = {strategy: Cost(product=seconds, held=held) for strategy, (seconds, held) in strategies.items()}
    return Choice(name, costs, Cost(), torch.device("cpu"), torch.float32, next(iter(costs)), "")


def fitted(choices, budget):
    """The strategies by which `choices` keep within the budget."""
    fit(choices, budget)
    return [choice.strategy for choice in choices]
