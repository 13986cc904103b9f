"""The models and arms of training steps, and the directions that they are compared with."""

import pytest
import torch
from oracle import assert_close
from oracle import direction as explicit_direction

from bench.measuring import cuda_timing
from bench.training import candidates, oracle
from bench.training.architectures import ARCHITECTURES
from bench.training.arms import OURS, PEERS, UNDER_AUTOCAST, Arm, Training, sgd
from bench.training.candidates import compare_with_float64
from bench.training.graphs import graph_clocks
from bench.training.growth import Series
from bench.training.models import cases, large_cases, loss
from bench.training.result import Result, graph_of, section


def test_large_models_are_for_cuda():
    assert set(large_cases()) < set(cases(quick=False, device="cuda"))
    assert not set(large_cases()) & set(cases(quick=False, device="cpu"))
    with torch.device("meta"):
        model, x, _ = large_cases()["GPT-2 small's shape, bfloat16, B = 8"].build()
        assert model(x).shape == (8, 1024, 50257)
    assert sum(p.numel() for p in model.parameters()) == 163_037_184


def test_steps_cover_the_architectures_of_table_1_in_both_normalisations():
    names = set(cases(quick=False))
    assert {f"{name}, {norm}, B = 32" for name in ARCHITECTURES for norm in ("GN", "BN")} < names
    assert set(cases(quick=True)) == {"MLP 784-1024-1024-10, B = 128"}


def test_exponent_of_a_power_of_the_size_is_the_power():
    series = Series("", "B", None, (2, 4, 8, 16), {size: {"SGD": [3.0 * size**2]} for size in (2, 4, 8, 16)})
    assert series.exponent("SGD") == pytest.approx(2)


@pytest.mark.parametrize("kind", ["MLP", "GPT", "GN", "BN"])
def test_oracle_averages_to_the_gradient(example, kind):
    model, x, y = example(kind)
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    with oracle.Sides() as sides:
        output = model(x)
    wanted = torch.autograd.grad(loss(output, y), list(model.parameters()))
    grads = oracle.per_sample_grads(model, x, y, sides)
    assert oracle.relative_error([g.mean(0) for g in grads], wanted) < 1e-12
    assert all(g.std(0).any() for g in grads)


def test_oracle_takes_the_sides_it_is_given(example):
    model, x, y = example("MLP")
    with oracle.Sides() as sides:
        model(x)
    for side in sides.positive:
        side.zero_()
    grads = oracle.per_sample_grads(model, x, y, sides)
    assert not grads[0].any()
    assert grads[-1].any()


@pytest.mark.parametrize("policy", ["Spectral", "Rayleigh"])
def test_direction_of_the_oracle_is_that_of_the_explicit_matrix(policy):
    grads = [torch.randn(4, 2, 3).double(), torch.randn(4, 5).double()]
    explicit = torch.cat([g.flatten(1) for g in grads], 1)
    got = torch.cat([part.flatten() for part in oracle.direction(grads, policy, 0.3)])
    assert_close(got, explicit_direction(explicit, policy, 0.3))


@pytest.mark.parametrize("kind", ["MLP", "GPT", "GN", "BN"])
def test_ours_are_exact_on_every_kind_of_model(example, kind):
    result = Result(kind)
    compare_with_float64(*example(kind), result)
    assert set(result.error) == {"RGD Spectral", "RGD Rayleigh"}


@pytest.mark.parametrize("half", ["autocast", "bfloat16"])
def test_directions_in_half_precision_have_its_rounding_errors(example, half):
    model, x, y = example("GPT")
    model, ours = (model, UNDER_AUTOCAST) if half == "autocast" else (model.bfloat16(), OURS)
    result = Result("small")
    compare_with_float64(model, x, y, result, ours)
    assert 1e-4 < result.error["RGD Spectral"] < 5e-2
    assert set(candidates.candidates(model, x, y, quick=False, result=result, ours=ours)[0]) == set(OURS)


def test_direction_that_is_not_exact_fails(example, monkeypatch):
    monkeypatch.setattr(oracle, "direction", lambda grads, policy, fraction: [g.mean(0) for g in grads])
    with pytest.raises(AssertionError, match="RGD Spectral: the direction differs from float64 by"):
        compare_with_float64(*example("MLP"), Result("small"))


def error_of_peer(name, model, x, y):
    trainings = [Training(arm, model, x, y) for arm in (PEERS[name], OURS[PEERS[name].same_as])]
    for training in trainings:
        training()
    return oracle.relative_error(trainings[0].direction(), trainings[1].direction())


def test_vmap_has_our_direction(example):
    assert error_of_peer("vmap(grad), Rayleigh", *example("MLP")) < 1e-4


@pytest.mark.filterwarnings("ignore::")
@pytest.mark.parametrize(
    ("name", "package"),
    [("Opacus, Rayleigh", "opacus"), ("BackPACK, Rayleigh", "backpack"), ("TorchJD, Spectral", "torchjd")],
)
def test_peers_have_our_direction(example, name, package):
    pytest.importorskip(package)
    assert error_of_peer(name, *example("MLP")) < 1e-4


def test_peer_that_is_missing_or_has_another_direction_is_left_out_with_the_reason(example, monkeypatch):
    def missing(model, x, y):
        raise ModuleNotFoundError("No module named 'peer'")

    peers = {"missing": Arm(sgd, missing, "RGD Rayleigh"), "SGD again": Arm(sgd, same_as="RGD Rayleigh")}
    monkeypatch.setattr(candidates, "PEERS", peers)
    result = Result("small")
    found, price = candidates.candidates(*example("MLP"), quick=False, result=result)
    assert set(found) == set(price) == set(OURS) == set(result.peak_bytes)
    assert result.left_out["missing"] == "ModuleNotFoundError: No module named 'peer'"
    assert "its direction differs from that of RGD Rayleigh by" in result.left_out["SGD again"]
    result.milliseconds = {name: [1.0, 2.0] for name in found}
    assert "No module named 'peer'" in str(section(result))


def ordinary_and_graphs(example, monkeypatch, timer=None):
    """What `graph_clocks` finds on a small MLP, with the result; on the CPU a replay is a step."""
    if timer is not None:
        monkeypatch.setattr(cuda_timing, "timer", lambda device: timer)
    model, x, y = example("MLP")
    arms = {name: Training(arm, model, x, y) for name, arm in OURS.items()}
    for step in arms.values():
        step()
    result = Result("MLP")
    return graph_clocks(model, x, y, arms, OURS, result), result


def test_the_steps_of_graphs_have_the_direction_of_ordinary_steps(example, monkeypatch):
    found, result = ordinary_and_graphs(example, monkeypatch)
    assert found.keys() == result.error.keys() == {graph_of(name) for name in OURS}
    assert max(result.error.values()) < 1e-4
    assert result.left_out == {}
    assert all(clock() > 0 for clock in found.values())


def test_a_step_that_cannot_be_captured_is_left_out_with_its_reason(example, monkeypatch):
    problem = RuntimeError("operation not permitted when stream is capturing")
    found, result = ordinary_and_graphs(example, monkeypatch, lambda call, inputs: (lambda: 1.0, problem))
    assert found == {}
    assert set(result.left_out.values()) == {f"RuntimeError: {problem}"}


def test_a_graph_that_writes_no_direction_is_left_out(example, monkeypatch):
    found, result = ordinary_and_graphs(example, monkeypatch, lambda call, inputs: (lambda: 1.0, None))
    assert found == {}
    assert all("its direction differs from that of" in why for why in result.left_out.values())


def test_arms_without_a_peak_are_shown(example):
    result = Result("MLP", {"SGD": [1.0, 2.0], graph_of("SGD"): [0.5, 1.0]}, {"SGD": 2**20})
    (_, (_, name, *cells)) = section(result)
    assert (name, cells[:6]) == (graph_of("SGD"), ["0.75", "0.50", "0.50 (0.50 to 0.50)", "", "", ""])
