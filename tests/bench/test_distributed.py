"""Training steps of several processes: the command, the checks, the counted bytes, and the predicted order."""

import json
from dataclasses import asdict
from itertools import permutations

import pytest
import torch
from torch import distributed

from bench.__main__ import main
from bench.distributed import SAMPLES, cases
from bench.distributing.agreement import compare
from bench.distributing.layers import measured_layers
from bench.distributing.link import LARGE, SMALL, link_of
from bench.distributing.order import MARGIN, wrongly_predicted
from bench.distributing.processes import Member, run_together
from bench.distributing.traffic import counted
from bench.simulating.links import Link, Network
from bench.simulating.schedule import total
from bench.training.arms import OURS, Training
from bench.training.models import cases as models

GPUS = [(1, False, {1}), (1, True, {1}), (3, False, {1, 2}), (8, True, {2})]
EXACT = {"RGD Rayleigh", "RGD Spectral, bound"}
COUNTED = {"SGD", "RGD local", *EXACT, "RGD Spectral, every=10", "RGD Spectral"}
ARMS = COUNTED | {"SGD, FSDP2", "RGD Rayleigh, FSDP2"}

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of the quick command."""
    path = tmp_path_factory.mktemp("distributed") / "distributed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bench", "distributed", "--device", "cpu", "--quick", "--json", str(path)])
        main()
    return json.loads(path.read_text())


@pytest.fixture
def model(record):
    """The only model of the record."""
    (found,) = record["models"]
    return found


def test_command_measures_all_arms(record, model):
    assert record["failures"] == []
    assert (model["processes"], record["environment"]["threads"]) == (2, 1)
    assert set(model["milliseconds"]) == ARMS
    assert set(model["bytes"]) == COUNTED
    assert all(time > 0 for times in model["milliseconds"].values() for time in times)
    assert max(model["error"].values()) < 1e-3
    assert model["error"].keys() == {"RGD Rayleigh", "RGD Rayleigh, FSDP2", "RGD Spectral"}


def test_exact_directions_take_two_gradients_and_local_ones_one(model):
    gradient = model["gradient_bytes"]
    assert gradient == 4 * (784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10)
    few = 32 * 2 * model["samples"]  # bytes, for all samples of the two processes
    assert model["bytes"]["SGD"] == gradient
    assert gradient < model["bytes"]["RGD local"] < gradient + few
    assert all(2 * gradient < model["bytes"][arm] < 2 * gradient + few for arm in EXACT)


def test_lanczos_takes_a_gradient_for_each_step_and_is_amortised(model):
    sent = model["gradients"]
    assert sent["RGD Spectral"] - 2 == pytest.approx(round(sent["RGD Spectral"] - 2), abs=0.01) != 0
    amortised = (sent["RGD Spectral"] + 9 * sent["RGD Rayleigh"]) / 10
    assert sent["RGD Spectral, every=10"] == pytest.approx(amortised, abs=0.01)


def test_predicted_order_is_the_measured_one_where_arms_clearly_differ(model):
    measured, predicted = model["measured"], model["predicted"]
    assert set(measured) == set(predicted) == {"SGD", "RGD local", "RGD Rayleigh", "RGD Spectral"}
    pairs = [(a, b) for a, b in permutations(measured, 2) if measured[b] > MARGIN * measured[a]]
    assert ("SGD", "RGD Spectral") in pairs
    assert all(predicted[fast] < predicted[slow] for fast, slow in pairs)
    assert model["wrongly_predicted"] == []


def test_pairs_in_another_order_are_named_if_they_differ_by_the_margin():
    predicted = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert wrongly_predicted({"a": 1.0, "b": 2.0, "c": 4.0}, predicted) == []
    assert wrongly_predicted({"a": 1.0, "b": 2.0, "c": 1.9}, predicted) == []
    assert wrongly_predicted({"a": 1.0, "b": 3.0, "c": 1.9}, predicted) == ["c before b"]


def test_models_are_those_of_steps_and_four_processes_have_a_part_of_the_batch_each():
    assert set(SAMPLES) <= set(models(quick=False))
    assert all(4 * samples <= int(name.rpartition("B = ")[2]) for name, samples in SAMPLES.items())


@pytest.mark.parametrize(
    ("gpus", "quick", "sizes"), [(1, False, {1}), (1, True, {1}), (3, False, {1, 2}), (8, True, {2})]
)
def test_there_is_a_gpu_for_each_process(monkeypatch, gpus, quick, sizes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert {size for _, size in cases("cuda", quick, [""]).values()} == sizes


def test_error_of_a_process_is_raised_with_its_message():
    assert run_together(getattr, 1, "cpu", "rank") == 0
    with pytest.raises(RuntimeError, match=r"process [01]: AttributeError: 'Member' object has no attribute 'colour'"):
        run_together(getattr, 2, "cpu", "colour")


class Alone(Member):
    """One process without a group."""

    def __init__(self):
        super().__init__(0, 1, "cpu", None)

    def wait(self):
        pass

    def gather(self, item):
        return [item]


class Different(Alone):
    """A process beside one that passes something else."""

    def gather(self, item):
        return [item, f"not {item}"]


@pytest.fixture
def trainings(example):
    """Arms of one process, their model, and the batches of all processes."""
    model, *batch = example("MLP")
    return {name: Training(arm, model, *batch) for name, arm in OURS.items()}, model, [batch]


def test_directions_of_one_process_agree(trainings):
    errors = compare(Alone(), *trainings)
    assert errors.keys() == {"RGD Rayleigh", "RGD Spectral"}
    assert max(errors.values()) < 1e-6


def test_directions_that_differ_between_processes_fail(trainings):
    with pytest.raises(AssertionError, match=r"SGD: \.grad of the processes differs"):
        compare(Different(), *trainings)


def test_direction_of_another_batch_fails(trainings):
    arms, model, [(x, y)] = trainings
    with pytest.raises(AssertionError, match="RGD Rayleigh: the direction differs from that of one process by"):
        compare(Alone(), arms, model, [(x, y), (x + 1, y)])


def test_counted_bytes_are_those_of_the_own_part(monkeypatch):
    calls = []
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(distributed, name, lambda *args, name=name, **options: calls.append((name, options)))
    part, all_reduce = torch.zeros(3), distributed.all_reduce
    with counted() as found:
        distributed.all_reduce(part, group="group")
        distributed.all_gather([part, part], part.double())
        distributed.broadcast(part, 0)
        distributed.broadcast(part, 0)
    assert found == {"all_reduce": 12, "all_gather": 24, "broadcast": 24}
    assert calls[0] == ("all_reduce", {"group": "group"})
    assert distributed.all_reduce is all_reduce


@pytest.mark.parametrize("kind", ["MLP", "GPT", "GN"])
def test_layers_have_all_parameters_and_the_time_of_the_model(example, kind):
    model, x, y = example(kind)
    layers = measured_layers(Alone(), model, x, y)
    sizes = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    assert sorted(layer.parameters for layer in layers) == sorted(filter(None, sizes))
    assert total(layers[:1], "parameters") == next(filter(None, sizes)), "the first layer of the forward comes first"
    assert all(each > 0 for layer in layers for each in list(asdict(layer).values())[1:])


def test_link_is_that_of_a_ring_with_the_measured_times():
    link = Link(latency=1e-4, bandwidth=1e9)
    ring = Network(4, link)
    found = link_of(4, ring.all_reduce(0).seconds, ring.all_reduce(LARGE).seconds)
    assert asdict(found) == pytest.approx(asdict(link))
    assert SMALL < 1e-5 * LARGE
    assert link_of(4, 2.0, 1.0).bandwidth > 0
