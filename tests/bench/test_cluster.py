"""Predicted steps: models, the schedules of methods, their simulation, and the tables of the page."""

import json
from itertools import chain, pairwise
from math import inf
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.simulating import schedule, sharded
from bench.simulating.links import Link, Network
from bench.simulating.prediction import LANCZOS, REPLICATED, SHARDED, predicted_order
from bench.simulating.schedule import CAPACITY, Plan, buckets, size, total
from bench.simulating.simulation import simulate
from bench.simulating.tables import DEVICE, tables
from bench.simulating.workload import MODELS, Layer, materialised

SAMPLES = 8
LAYERS = MODELS["GPT-2 small"].layers(DEVICE)
METHODS = {f"{name}, {kind}": m for kind, ms in (("DDP", REPLICATED), ("FSDP2", SHARDED)) for name, m in ms.items()}
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("GPT-2 small", 124_439_808),
        ("GPT-2 medium", 354_823_168),
        ("GPT-2 large", 774_030_080),
        ("GPT-2 XL", 1_557_611_200),
        ("Llama 7B", 6_738_415_616),
    ],
)
def test_models_have_their_published_number_of_parameters(name, parameters):
    assert total(MODELS[name].layers(DEVICE), "parameters") == parameters


def test_operations_are_six_for_each_weight_and_token():
    layers, tokens = MODELS["GPT-2 small"].layers(DEVICE), 8 * 1024
    weights = 12 * 12 * 768**2 + 50_257 * 768  # of the products of matrices
    attention = 12 * 3 * 2 * 1024 * 768 * tokens  # half of two products per layer, and twice that in the backward
    operations = (total(layers, "forward") + total(layers, "backward")) * DEVICE.peak * DEVICE.utilisation
    assert operations == pytest.approx(6 * weights * tokens + attention)


def test_kept_gradients_are_written_once_and_read_by_later_products():
    kept = materialised(LAYERS, SAMPLES, DEVICE)
    traffic = SAMPLES * size(LAYERS) / DEVICE.memory
    assert total(kept, "backward") - total(LAYERS, "backward") == pytest.approx(traffic)
    assert total(kept, "gradient") == pytest.approx(traffic)


def test_buckets_are_the_layers_from_the_last_on_and_closed_when_full():
    found = buckets(LAYERS)
    assert [*chain(*found)] == LAYERS[::-1]
    assert all(size(bucket[:-1]) < CAPACITY <= size(bucket) for bucket in found[:-1])


def network(ranks=8, latency=5e-6, bandwidth=1e10):
    return Network(ranks, Link(latency, bandwidth))


def seconds(tasks, on_network):
    return sum(task.seconds for task in tasks if task.network == on_network)


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def test_step_without_overlap_is_the_sum_of_its_tasks(method):
    tasks = method(LAYERS, network(), SAMPLES)
    assert simulate(tasks, overlap=False).seconds == pytest.approx(sum(task.seconds for task in tasks))


def test_step_with_a_network_that_takes_no_time_is_computation_alone(method):
    step = simulate(method(LAYERS, network(latency=0, bandwidth=inf), SAMPLES))
    assert step.seconds == pytest.approx(seconds(step.tasks, on_network=False))
    assert step.waiting == pytest.approx(0, abs=1e-12)


def test_step_takes_at_least_the_busier_stream_and_less_than_their_sum(method):
    step = simulate(method(LAYERS, network(), SAMPLES))
    streams = [seconds(step.tasks, on_network) for on_network in (False, True)]
    assert max(streams) < step.seconds < sum(streams)
    assert step.waiting == pytest.approx(step.seconds - streams[0])


def test_step_is_no_slower_with_a_better_network(method):
    def step(**link):
        return simulate(method(LAYERS, network(**link), SAMPLES)).seconds

    by_bandwidth = [step(bandwidth=10.0**power) for power in range(8, 13)]
    by_latency = [step(latency=10.0**power) for power in range(-3, -9, -1)]
    for times in (by_bandwidth, by_latency):
        assert all(worse > better for worse, better in pairwise(times))


# Bytes of a rank: headers, masks of parameters and ends; and numbers of samples.
CONTROL, FEW = (8 - 1) * (6 * 8 + 2 * 8), (8 - 1) * (6 * 8 + 2 * 8 + 2 * 8 * SAMPLES)


def sent(method):
    return sum(task.sent for task in method(LAYERS, network(), SAMPLES))


def test_exact_sends_twice_the_bytes_of_ddp_and_a_few_numbers():
    assert sent(schedule.exact) == pytest.approx(2 * sent(schedule.sgd) + FEW, rel=1e-12)
    assert 1e-5 * sent(schedule.sgd) > FEW


def test_local_sends_the_bytes_of_ddp_and_lanczos_those_of_ddp_for_each_step():
    assert sent(schedule.local) == pytest.approx(sent(schedule.sgd) + CONTROL, rel=1e-12)
    more = sent(REPLICATED["RGD, Lanczos"]) - sent(REPLICATED["RGD"])
    assert more == pytest.approx(LANCZOS * sent(schedule.sgd))
    assert sent(REPLICATED["RGD, bound"]) - sent(REPLICATED["RGD"]) == pytest.approx((8 - 1) * 8)


def test_fsdp2_sends_blocks_three_times_and_the_root_twice_and_rgd_all_twice_more():
    root, blocks = sharded.groups(LAYERS)
    part = (8 - 1) / 8
    assert sent(sharded.sgd) == pytest.approx(part * (3 * sum(map(size, blocks)) + 2 * size(root)))
    assert sent(sharded.exact) - sent(sharded.sgd) == pytest.approx(
        part * 2 * size(LAYERS) + FEW + (8 - 1) * 8, rel=1e-9
    )


# Two ranks, two blocks and an embedding. An all-reduce of a block takes 3 s, half of it an all-gather.
BLOCK = CAPACITY // 4
BY_HAND = [Layer(0, BLOCK, 0, 0, 0), Layer(1, BLOCK, 1, 2, 1), Layer(2, BLOCK, 1, 2, 1)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Forward until 2, the gradients of the second block until 4; all-reduces from 4 to 7, 10 and 13.
        (schedule.sgd, 13),
        # Backward until 6, the weighted sum until 8; all-reduces to 11, 14 and 17.
        (schedule.local, 17),
        # As SGD until 13, alignments from 7 to 8 and from 10 to 11, the sum of the second block until 14; all-reduces
        # to 17, 20 and 23.
        (schedule.exact, 23),
        # Gathers until 1.5, 3 and 4.5, the forward until 5.5; gathers until 7 and 8.5, the second block until 9 and the
        # first until 11; scatters until 10.5, 12.5 and 14.
        (sharded.sgd, 14),
        # Backward without gradients until 8 and 9.5; all-reduces of means from 9.5 to 12.5, from 13.5 to 16.5 and from
        # 19.5 to 22.5, alignments until 24.5; scatters until 26, after sums from 27 to 28.5 and from 29.5 to 31.
        (sharded.exact, 31),
    ],
)
def test_steps_by_hand(method, expected):
    tasks = method(BY_HAND, Network(2, Link(0, CAPACITY / 3)), SAMPLES)
    assert simulate(tasks).seconds == pytest.approx(expected, abs=1e-3)


def test_exact_sends_the_mean_during_the_backward():
    step = simulate(schedule.exact(LAYERS, network(), SAMPLES))
    backward = [index for index, task in enumerate(step.tasks) if task.name == "backward"]
    computed = [index for index in backward if not step.tasks[index].network]
    first_sent = next(index for index in backward if step.tasks[index].network)
    assert step.begins[first_sent] == step.ends[computed[0]] < step.ends[computed[-1]]


@pytest.mark.parametrize("bandwidth", [1e9, 1e10, 1e11])
def test_step_takes_at_least_the_critical_path_of_the_page(bandwidth):
    net = network(bandwidth=bandwidth)
    forward, backward, product = (total(LAYERS, part) for part in ("forward", "backward", "gradient"))
    reduces = [net.all_reduce(size(bucket)).seconds for bucket in buckets(LAYERS)]
    every, last = sum(reduces), reduces[-1]

    aligned = total(buckets(LAYERS)[-1], "gradient")

    def passed(part):
        return max(total(LAYERS, part) + last, total(buckets(LAYERS)[0], part) + every)

    paths = {
        schedule.sgd: forward + passed("backward"),
        schedule.local: forward + backward + product + every,
        schedule.exact: forward + max(backward + product, passed("backward") + aligned) + passed("gradient"),
        REPLICATED["RGD, Lanczos"]: forward + passed("backward") + (LANCZOS + 1) * (product + passed("gradient")),
    }
    for method, path in paths.items():
        step = simulate(method(LAYERS, net, SAMPLES)).seconds
        assert path * (1 - 1e-12) <= step < 1.02 * path  # rounding, and buckets of unequal size


def test_no_more_than_two_blocks_are_gathered_at_once():
    step = simulate(sharded.sgd(LAYERS, network(latency=0, bandwidth=inf), SAMPLES))
    forward = [index for index, task in enumerate(step.tasks) if task.name == "forward"]
    _, *gathers = (index for index in forward if step.tasks[index].network)
    computed = [index for index in forward if not step.tasks[index].network]
    assert len(gathers) == 12
    for computation, gather in zip(computed, gathers[2:], strict=False):
        assert step.begins[gather] == step.ends[computation]


def test_collective_waits_for_the_slowest_rank_and_the_next_computation_does_not():
    plan = Plan()
    first = plan.compute("first", 2)
    plan.send("sum", network(ranks=2, latency=0, bandwidth=1).all_reduce(5), [first])
    plan.compute("second", 4)
    step = simulate(plan.tasks, [[1, 1, 1], [3, 1, 1]])
    assert step.begins == [[0, 0], [6, 6], [2, 6]]
    assert step.ends == [[2, 6], [11, 11], [6, 10]]


def test_ranks_that_are_alike_are_as_one(method):
    tasks = method(LAYERS, network(), SAMPLES)
    alike = simulate(tasks, [[1.0] * len(tasks)] * 3)
    assert alike.ends == [times * 3 for times in simulate(tasks).ends]


def test_order_begins_with_the_fastest_method():
    order = predicted_order(LAYERS, network(ranks=2), SAMPLES)
    assert list(order.values()) == sorted(order.values())
    assert list(order) == ["SGD", "RGD local", "RGD", "RGD, bound", "RGD, Lanczos"]
    alone = predicted_order(LAYERS, network(ranks=2), SAMPLES, overlap=False)
    assert all(alone[name] > order[name] for name in order)


def markdown(cells):
    return f"| {' | '.join(cells)} |"


def test_page_has_the_tables_of_the_command():
    """Whole tables, one after another, so that the page has no rows of an older version."""
    page = PAGE.read_text()
    for table in tables(quick=False):
        columns = markdown(table.columns)
        rows = [columns, "|" + "---|" * len(table.columns), *map(markdown, table.cells())]
        assert f"{chr(10).join(rows)}\n\n" in page, table.title
        page = page[page.index(columns) + len(columns) :]


def test_command_prints_its_tables_and_writes_their_numbers_and_a_plot(monkeypatch, tmp_path, capsys):
    record, plot = tmp_path / "cluster.json", tmp_path / "cluster.png"
    monkeypatch.setattr("sys.argv", ["bench", "cluster", "--quick", "--json", str(record), "--plot", str(plot)])
    main()
    found, printed = json.loads(record.read_text())["tables"], capsys.readouterr().out
    assert [table["title"] for table in found] == [table.title for table in tables(quick=True)]
    assert all(cell in printed for table in tables(quick=True) for row in table.cells() for cell in row)
    assert plot.read_bytes().startswith(b"\x89PNG")
