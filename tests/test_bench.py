"""The benchmarks run and leave what they promise; what they measure on is what they say."""

import json
import math
from pathlib import Path

import pytest
import torch
from oracle import assert_close, direction

import rgd_ext

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _on_one_thread(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(monkeypatch):
    def run(*arguments):
        from bench.__main__ import main

        monkeypatch.setattr("sys.argv", ["bench", *arguments, "--device", "cpu", "--quick"])
        main()

    return run


def test_kernels(bench, tmp_path, capsys):
    path = tmp_path / "kernels.json"
    bench("kernels", "--only", "d = 1e+04, B = 16", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["environment"]["torch"] == torch.__version__
    assert {"clocks", "ceilings", "device", "failures"} <= set(record)
    assert [case["dtype"] for case in record["cases"]] == ["float32", "bfloat16"]
    for case in record["cases"]:
        assert {"precondition", "naive", "gram", "G @ G.T", "moments"} <= set(case["milliseconds"])
        roles = [name.partition(":")[0] for name in case["milliseconds"]]
        assert roles.count("eager") == roles.count("read") == 1
        assert case["milliseconds"].keys() == case["bytes_moved"].keys()
        assert all(time > 0 for times in case["milliseconds"].values() for time in times)
        assert case["case"].partition(",")[0] in printed


def test_steps(bench, tmp_path, capsys):
    path = tmp_path / "steps.json"
    bench("steps", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    (model,) = record["models"]
    arms = {"SGD", "RGD Spectral", "RGD Rayleigh"}
    assert set(model["milliseconds"]) == set(model["peak_bytes"]) == arms
    assert len({len(times) for times in model["milliseconds"].values()}) == 1
    assert set(model["error"]) == arms - {"SGD"}
    # The gradient, at least.
    assert min(model["peak_bytes"].values()) >= 4 * (784 * 1024 + 1024 * 1024 + 1024 * 10)
    assert model["model"] in printed


@pytest.mark.parametrize("command", ["kernels", "steps", "operators", "scaling", "modules", "verification"])
def test_name_that_nothing_has_is_refused(bench, command):
    with pytest.raises(SystemExit, match="no case has 'no such' in its name: "):
        bench(command, "--only", "no such")


def test_only_chooses_in_its_order():
    from bench.selection import chosen

    cases = {"a 1": 1, "b 1": 2, "b 2": 3}
    assert list(chosen(cases, ["b 2", "1"])) == ["b 2", "a 1", "b 1"]
    assert chosen(cases, [""]) == cases


def test_operators(bench, tmp_path, capsys):
    path = tmp_path / "operators.json"
    bench("operators", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    kinds = {case["case"].partition(",")[0].partition(" (")[0] for case in record["cases"]}
    assert kinds == {
        "lambda_max",
        "moments of a Gramian",
        "GroupNorm",
        "LayerNorm",
        "RMSNorm",
        "Gramian",
        "Conv2d 3 x 3",
    }
    for case in record["cases"]:
        assert len(case["milliseconds"]) > 1
        assert case["milliseconds"].keys() == case["error"].keys()
        assert case["case"] in printed


def test_an_operator_that_is_wrong_fails_and_another_way_is_left_out():
    from bench.operators import Case, bench, failures_of

    def inputs():
        return (torch.ones(3),)

    ways = {"operator": lambda x: 2 * x, "other": lambda x: 3 * x, "right": lambda x: x + 0}
    result = bench("case", Case(inputs, lambda x: x, ways), "cpu", quick=True)
    assert set(result.milliseconds) == {"right"}
    assert failures_of(result) == ["case: operator: differs from float64 by 1.0e+00 of its largest value"]


def test_every_operator_has_inputs():
    from bench.operator_inputs import INPUTS

    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    assert set(INPUTS) == {name for namespace, _, name in names if namespace == "rgd_ext"}


def test_smoke_prints_a_line_for_each_result_and_finds_what_is_wrong(monkeypatch, capsys):
    from bench import smoke

    assert smoke.check("precondition", "cpu") == []
    assert len(capsys.readouterr().out.splitlines()) == 12
    monkeypatch.setattr(smoke, "call", lambda name, arguments: [1.01 * g.mean(0) for g in arguments[0]])
    assert all("WRONG" in line for line in smoke.check("precondition", "cpu"))


def test_smoke_names_an_operator_whose_process_dies(monkeypatch):
    from bench import smoke

    monkeypatch.setattr(smoke, "INPUTS", {"gram": None, "none": None})
    monkeypatch.setattr(smoke.sys, "executable", "false")
    assert smoke.check_all("cpu") == ["gram: exit status 1", "none: exit status 1"]


@pytest.mark.skipif(not rgd_ext.build_info()["compiled"], reason="needs kernels")
def test_sanitized_run_takes_all_kernels_and_the_named_dtypes(monkeypatch, capsys):
    from bench import sanitized_run
    from bench.operator_inputs import compiled

    ran = []
    monkeypatch.setattr(sanitized_run, "call", lambda name, arguments: ran.append(name) or torch.zeros(1))
    sanitized_run.run("cpu", [torch.float32])
    assert set(ran) == set(compiled("cpu")) > {"moments", "gram", "layer_norm_grads"}
    assert len(capsys.readouterr().out.splitlines()) == len(sanitized_run.SHAPES)


def test_the_kernels_that_ncu_profiles_run(monkeypatch, capsys):
    from bench import ncu_run

    small = [(name, (8, 64) if len(shape) == 2 else (2, 3, 8), dtype) for name, shape, dtype in ncu_run.RUNS]
    monkeypatch.setattr(ncu_run, "RUNS", small)
    ncu_run.run("cpu")
    assert len(capsys.readouterr().out.splitlines()) == len(small)


def test_profile_of_a_step_names_what_takes_time():
    from bench.step_profile import profiled

    x = torch.randn(100, 100)
    launches, table = profiled(lambda: x @ x, "cpu")
    assert launches == 0
    assert "aten::mm" in table


@pytest.mark.parametrize("half", ["autocast", "bfloat16"])
def test_directions_in_half_precision_are_as_exact_as_that_is(half):
    from bench.candidates import candidates, compare_with_float64
    from bench.step_result import Result
    from bench.training_steps import OURS, UNDER_AUTOCAST

    model, x, y = small_example("GPT")
    model, ours = (model, UNDER_AUTOCAST) if half == "autocast" else (model.bfloat16(), OURS)
    result = Result("small")
    compare_with_float64(model, x, y, result, ours)
    assert 1e-4 < result.error["RGD Spectral"] < 5e-2
    assert set(candidates(model, x, y, quick=False, result=result, ours=ours)[0]) == set(OURS)


def test_large_models_are_for_cuda():
    from bench.models import cases, large_cases

    assert set(large_cases()) < set(cases(quick=False, device="cuda"))
    assert not set(large_cases()) & set(cases(quick=False, device="cpu"))
    with torch.device("meta"):
        model, x, _ = large_cases()["GPT-2 small's shape, bfloat16, B = 8"].build()
        assert model(x).shape == (8, 1024, 50257)
    assert sum(p.numel() for p in model.parameters()) == 163_037_184


def test_record_that_was_written_before_stays_whole(tmp_path):
    from bench.report import write_json

    path = tmp_path / "record.json"
    write_json(str(path), {"number": 1}, None)
    with pytest.raises(TypeError):
        write_json(str(path), {"number": torch.nn}, None)
    assert json.loads(path.read_text())["number"] == 1


def test_scaling(bench, tmp_path, capsys):
    path, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    bench("scaling", "--only", "MLP 784-512", "--json", str(path), "--plot", str(plot))
    (series,) = json.loads(path.read_text())["series"]
    assert list(series["milliseconds"]) == ["2", "4"]
    assert all(set(samples) == {"SGD", "RGD"} for samples in series["milliseconds"].values())
    assert "layers^" in capsys.readouterr().out
    assert plot.read_bytes()[1:4] == b"PNG"


def test_exponent_of_a_power_of_the_size_is_the_power():
    from bench.scaling import Series

    series = Series("", "B", None, (2, 4, 8, 16), {size: {"SGD": [3.0 * size**2]} for size in (2, 4, 8, 16)})
    assert series.exponent("SGD") == pytest.approx(2)


def test_steps_cover_the_architectures_of_table_1_in_both_normalisations():
    from bench.models import cases
    from bench.table1 import ARCHITECTURES

    names = set(cases(quick=False))
    assert {f"{name}, {norm}, B = 32" for name in ARCHITECTURES for norm in ("GN", "BN")} < names
    assert set(cases(quick=True)) == {"MLP 784-1024-1024-10, B = 128"}


def test_peak_memory_counts_what_lives_at_once():
    from bench.memory import extra_memory

    def call():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        kept.append((second, torch.empty(700)))

    kept = []
    assert extra_memory(call, "cpu") == 4 * 1500
    assert extra_memory(lambda: None, "cpu") == 0


def test_memory_is_limited_within_and_not_afterwards():
    from bench.memory import limited_memory

    def allocate():
        return torch.empty(2**36, dtype=torch.uint8)  # not touched, so nothing is used

    with limited_memory("cpu", share=0.5), pytest.raises(RuntimeError, match="memory"):
        allocate()
    import resource

    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_slow_arms_are_sampled_less_and_paired_with_their_rounds():
    from bench.measure import interleave, ratio

    times = iter(range(1, 100))
    clocks = {"fast": lambda: float(next(times)), "slow": lambda: 100.0}
    samples = interleave(clocks, rounds=8, warm_up=0, counts={"slow": 3})
    assert samples == {"fast": [1, 2, 3, 4, 5, 6, 7, 8], "slow": [100, 100, 100]}
    assert ratio(samples, "slow", "fast")[0] == 100 / 4  # rounds 1, 4 and 7
    assert ratio({"fast": [1.0, 2.0], "slow": [6.0]}, "slow", "fast") == (6, 6, 6)


def small_example(kind):
    from bench import models
    from bench.architectures import group_norm, resnet

    if kind == "MLP":
        return models.mlp(batch_size=5, width=16)
    if kind == "GPT":
        model = models.GPT(vocabulary=11, width=8, layers=1, heads=2, length=4)
        return model, torch.randint(11, (5, 4)), torch.randint(11, (5, 4))
    model, x, y = models.on_images(resnet(8, norm=group_norm if kind == "GN" else torch.nn.BatchNorm2d), 3)
    return model, x[..., :8, :8], y


@pytest.mark.parametrize("kind", ["MLP", "GPT", "GN", "BN"])
def test_oracle_averages_to_the_gradient(kind):
    from bench import oracle
    from bench.models import loss

    model, x, y = small_example(kind)
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    with oracle.Sides() as sides:
        output = model(x)
    wanted = torch.autograd.grad(loss(output, y), list(model.parameters()))
    grads = oracle.per_sample_grads(model, x, y, sides)
    assert oracle.relative_error([g.mean(0) for g in grads], wanted) < 1e-12
    assert all(g.std(0).any() for g in grads)


def test_oracle_takes_the_sides_it_is_given():
    from bench import oracle

    model, x, y = small_example("MLP")
    with oracle.Sides() as sides:
        model(x)
    for side in sides.positive:
        side.zero_()
    grads = oracle.per_sample_grads(model, x, y, sides)
    assert not grads[0].any()
    assert grads[-1].any()


@pytest.mark.parametrize("policy", ["Spectral", "Rayleigh"])
def test_direction_of_the_oracle_is_that_of_the_explicit_matrix(policy):
    from bench import oracle

    grads = [torch.randn(4, 2, 3).double(), torch.randn(4, 5).double()]
    explicit = torch.cat([g.flatten(1) for g in grads], 1)
    got = torch.cat([part.flatten() for part in oracle.direction(grads, policy, 0.3)])
    assert_close(got, direction(explicit, policy, 0.3))


def run_peer(name):
    from bench import oracle
    from bench.training_steps import OURS, PEERS, Training

    model, x, y = small_example("MLP")
    trainings = [Training(arm, model, x, y) for arm in (PEERS[name], OURS[PEERS[name].same_as])]
    for training in trainings:
        training()
    return oracle.relative_error(trainings[0].direction(), trainings[1].direction())


def test_vmap_goes_where_we_go():
    assert run_peer("vmap(grad), Rayleigh") < 1e-4


@pytest.mark.filterwarnings("ignore::")
@pytest.mark.parametrize(
    ("name", "package"),
    [("Opacus, Rayleigh", "opacus"), ("BackPACK, Rayleigh", "backpack"), ("TorchJD, Spectral", "torchjd")],
)
def test_peers_go_where_we_go(name, package):
    pytest.importorskip(package)
    assert run_peer(name) < 1e-4


def test_peer_that_is_missing_or_goes_elsewhere_is_left_out_with_the_reason(monkeypatch):
    from bench import candidates
    from bench.step_result import Result, section
    from bench.training_steps import OURS, Arm, sgd

    def missing(model, x, y):
        raise ModuleNotFoundError("No module named 'peer'")

    peers = {"missing": Arm(sgd, missing, "RGD Rayleigh"), "SGD again": Arm(sgd, same_as="RGD Rayleigh")}
    monkeypatch.setattr(candidates, "PEERS", peers)
    result = Result("small")
    found, price = candidates.candidates(*small_example("MLP"), quick=False, result=result)
    assert set(found) == set(price) == set(OURS) == set(result.peak_bytes)
    assert result.left_out["missing"] == "ModuleNotFoundError: No module named 'peer'"
    assert "its direction differs from that of RGD Rayleigh by" in result.left_out["SGD again"]
    result.milliseconds = {name: [1.0, 2.0] for name in found}
    assert "No module named 'peer'" in str(section(result))


def test_direction_that_is_not_exact_fails(monkeypatch):
    from bench import oracle
    from bench.candidates import compare_with_float64
    from bench.step_result import Result

    monkeypatch.setattr(oracle, "direction", lambda grads, policy, fraction: [g.mean(0) for g in grads])
    with pytest.raises(AssertionError, match="RGD Spectral: the direction differs from float64 by"):
        compare_with_float64(*small_example("MLP"), Result("small"))


@pytest.mark.parametrize("kind", ["MLP", "GPT", "GN", "BN"])
def test_ours_are_exact_on_every_kind_of_model(kind):
    from bench.candidates import compare_with_float64
    from bench.step_result import Result

    result = Result(kind)
    compare_with_float64(*small_example(kind), result)
    assert set(result.error) == {"RGD Spectral", "RGD Rayleigh"}


def test_overhead(bench, tmp_path, capsys):
    path = tmp_path / "overhead.json"
    bench("overhead", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    for layer, depths in record["milliseconds"].items():
        assert layer in printed
        shallow, deep = depths.values()
        assert shallow.keys() == deep.keys() >= {"SGD", "RGD Spectral", "RGD Rayleigh"}
        assert min(deep["SGD"]) > min(shallow["SGD"])


def test_modules(bench, tmp_path, capsys):
    path = tmp_path / "modules.json"
    bench("modules", "--only", "PReLU", "--json", str(path))
    assert set(json.loads(path.read_text())["milliseconds"]["PReLU"]) == {"SGD", "RGD"}
    assert "PReLU" in capsys.readouterr().out


def test_every_module_with_parameters_has_a_case(monkeypatch):
    from bench import modules

    known = {name.partition(",")[0] for name in modules.cases()} | modules.EXCEPTIONS
    assert modules.with_parameters() <= known
    assert {"Linear", "Transformer", "GRUCell", "AdaptiveLogSoftmaxWithLoss", "PReLU"} <= modules.with_parameters()
    monkeypatch.setattr(modules, "EXCEPTIONS", modules.EXCEPTIONS - {"SyncBatchNorm"})
    assert modules.run("cpu", True, None, ["PReLU"]) == ["torch.nn.SyncBatchNorm has no case"]


def test_overhead_is_the_slope_between_the_depths(monkeypatch):
    from bench import overhead

    costs, once = {"SGD": 40, "RGD": 55}, 1e3  # us
    samples = {
        str(depth): {name: [(once + depth * cost) / 1e3] * 3 for name, cost in costs.items()}
        for depth in (overhead.SHALLOW, overhead.DEEP)
    }
    monkeypatch.setattr(overhead, "OURS", {"SGD": None, "RGD": None})
    assert overhead.section("layer", samples) == [
        ["layer", "SGD", "40.0", ""],
        ["", "RGD", "55.0", "15.0 (15.0 to 15.0)"],
    ]


def test_verification(bench, tmp_path, capsys):
    path = tmp_path / "verification.json"
    bench("verification", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    for model, result in record["results"].items():
        assert model in printed
        times = result["milliseconds"]
        assert times.keys() == {f"{which}, {arm}" for which in ("first", "later") for arm in result["bytes"]}
        assert min(times["first, verified"]) > min(times["first, not verified"])


def test_parameter_lists_are_those_of_the_networks():
    from bench.cases import gpt2_small_shapes, resnet50_shapes

    for shapes, tensors, weights in (
        (resnet50_shapes(), 161, 25_557_032),
        (gpt2_small_shapes(), 148, 124_439_808),
    ):
        assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, weights)


def test_tensors_and_one_tensor_lie_in_the_same_memory():
    from bench.cases import ALIGNMENT, Case, fill

    case = Case("odd", 3, [5, 1, 400], torch.bfloat16)
    buffer = fill(case, "cpu")
    assert [tuple(t.shape) for t in buffer.tensors] == [(3, 5), (3, 1), (3, 400)]
    assert [tuple(t.shape) for t in buffer.flat] == [(3, 406)]
    assert all(t.is_contiguous() for t in buffer.tensors + buffer.flat)
    assert all((t.data_ptr() - buffer.tensors[0].data_ptr()) % ALIGNMENT == 0 for t in buffer.tensors)
    buffer.flat[0].zero_()
    assert not buffer.tensors[0].any()


def test_cases_that_fail_or_are_interrupted_leave_the_others():
    from bench.selection import run_cases

    def bench(name, case):
        if case is not None:
            raise case
        return name

    cases = {
        "first": None,
        "second": ValueError("too large"),
        "third": None,
        "fourth": KeyboardInterrupt(),
        "fifth": None,
    }
    results, failures = [], []
    run_cases(cases, bench, results.append, failures)
    assert results == ["first", "third"]
    assert failures[0].startswith("second: ")
    assert "too large" in failures[0]
    assert failures[1:] == ["interrupted: the cases that follow are missing"]
