"""Directions along weightings of TorchJD are those of its own engines, autogram and autojac."""

import copy
import statistics

import pytest
import torch
from models import MODELS
from oracle import flat_grad, relative_error

import rgd_ext
from bench.training.models import GPT
from bench.training.peers import sample_losses

aggregation = pytest.importorskip("torchjd.aggregation")
autogram = pytest.importorskip("torchjd.autogram")
autojac = pytest.importorskip("torchjd.autojac")

pytestmark = pytest.mark.usefixtures("one_thread")

B = 6
WEIGHTINGS = {  # with the arguments that have no default
    "UPGrad": {},
    "MGDA": {},
    "AlignedMTL": {},
    "IMTLG": {},
    "CAGrad": {"c": 0.5},
    "PCGrad": {},
    "DualProj": {},
    "Mean": {},
}
# AlignedMTL and IMTL-G invert the Gramian, and MGDA chooses and divides by differences of its entries. So they amplify
# its rounding errors, which differ from engine to engine: in float32, the directions of any two engines differ by up to
# 3e-6 on the batches of these tests, and by 1e-5 on others.
AMPLIFYING = {"MGDA", "AlignedMTL", "IMTLG"}
SEEDS = range(9)


def chosen_by(weighting, kind="Weighting"):
    """The weighting of that name, or its aggregator with "" as kind; skips where its solver is not installed."""
    try:
        return getattr(aggregation, weighting + kind)(**WEIGHTINGS[weighting])
    except ImportError as problem:
        pytest.skip(str(problem))


def by_capture(model, x, y, weighting):
    rule = rgd_ext.weights.FromGramian(chosen_by(weighting))
    with rgd_ext.precondition(model, weights=rule):
        sample_losses(model(x), y).mean().backward()


def by_autogram(model, x, y, weighting):
    engine = autogram.Engine(model, batch_dim=0)
    found = sample_losses(model(x), y)
    found.backward(chosen_by(weighting)(engine.compute_gramian(found)))


def by_autojac(model, x, y, weighting):
    # One row after another, since vmap warns that it has no batching rule for attention.
    autojac.backward(sample_losses(model(x), y), parallel_chunk_size=1)
    autojac.jac_to_grad(model.parameters(), chosen_by(weighting, ""))


def on_samples(name):
    """A model of the catalogue, with a batch of inputs and labels."""
    build, inputs = MODELS[name]
    return build(), *inputs(B), torch.randint(3, (B,))


def language_model(build):
    return build(), torch.randint(11, (B, 9)), torch.randint(11, (B, 9))


# Autogram needs the batch in front of every layer's input, and weights that only one layer has, so the GPT of the
# catalogue, whose positions are looked up once and whose head is tied, is for autojac alone.
ENGINES = [by_autogram, by_autojac]
CASES = {
    "MLP": (lambda: on_samples("MLP"), ENGINES),
    "CNN": (lambda: on_samples("ResNet"), ENGINES),
    "GPT": (lambda: language_model(lambda: GPT(vocabulary=11, width=8, layers=2, heads=2, length=9)), ENGINES),
    "GPT, tied": (lambda: language_model(MODELS["GPT"][0]), [by_autojac]),
}


def directions(case, weighting, dtype, seed=0):
    """Our direction, and those of TorchJD's engines, on a model and a batch by the seed."""
    build, engines = CASES[case]
    torch.manual_seed(seed)
    model, x, y = build()
    x = x.to(dtype) if x.is_floating_point() else x

    def direction(engine):
        own = copy.deepcopy(model).to(dtype)
        torch.manual_seed(1)  # PCGrad takes the samples in a random order
        engine(own, x, y, weighting)
        return flat_grad(own)

    return direction(by_capture), [direction(engine) for engine in engines]


def test_an_aggregator_is_not_taken_for_a_weighting_nor_a_weighting_for_a_rule():
    with pytest.raises(TypeError, match=r"an aggregator gives a direction and not weights; pass its weighting"):
        rgd_ext.weights.FromGramian(aggregation.MGDA())
    with pytest.raises(TypeError, match=r"which takes a Gramian: wrap it, rgd_ext.weights.FromGramian\(...\)"):
        rgd_ext.precondition(torch.nn.Linear(2, 1), weights=aggregation.MGDAWeighting())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("case", CASES)
def test_directions_in_float64_are_those_of_torchjd(case, weighting):
    ours, theirs = directions(case, weighting, torch.float64)
    for direction in theirs:
        assert relative_error(ours, direction) < 1e-10


@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS.keys() - AMPLIFYING))
@pytest.mark.parametrize("case", CASES)
def test_directions_in_float32_are_those_of_torchjd(case, weighting):
    ours, theirs = directions(case, weighting, torch.float32)
    for direction in theirs:
        assert relative_error(ours, direction) < 1e-6


def distances_from_float64(case, weighting, seed):
    """How far our direction in float32 is from the one in float64, and how far those of TorchJD's engines are."""
    _, (*_, exact) = directions(case, weighting, torch.float64, seed)
    ours, theirs = directions(case, weighting, torch.float32, seed)
    return [relative_error(direction, exact) for direction in (ours, *theirs)]


@pytest.mark.parametrize("weighting", sorted(AMPLIFYING))
@pytest.mark.parametrize("case", CASES)
def test_directions_that_amplify_rounding_are_as_exact_in_float32_as_those_of_torchjd(case, weighting):
    # On a single batch it is a matter of luck whose errors are amplified more.
    batches = [distances_from_float64(case, weighting, seed) for seed in SEEDS]
    ours, *theirs = (statistics.median(distances) for distances in zip(*batches, strict=True))
    for distance in theirs:
        assert ours <= max(1e-6, 2 * distance)
