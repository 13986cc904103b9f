"""The record of a training, and what survives of it when the run is killed."""

import csv
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from models import mlp
from monitoring import HEADER, backward, write

import rgd_ext
from rgd_ext import monitor


class Scalars(list):
    """What is used of a SummaryWriter."""

    def add_scalar(self, tag, scalar_value, global_step):
        self.append((tag, scalar_value, global_step))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.csv"


def steps_in(path):
    return monitor.read(path)["step"].tolist()


def test_row_holds_the_numbers_of_the_last_backward(model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        loss = backward(model)
        record.log(loss)
    stats = handle.stats
    quantiles = np.quantile(8 * stats.weights.numpy(), [0, 0.25, 0.5, 0.75, 1])
    expected = {
        "step": 0,
        "batch_size": 8,
        "loss": loss.detach(),
        "epsilon": stats.epsilon,
        "lambda_max": torch.linalg.eigvalsh(stats.centred_gram)[-1] / 8,
        "trace": stats.trace,
        "rayleigh": stats.rayleigh,
        "cosine": stats.cosine,
        "effective_sample_size": 1 / stats.weights.square().sum(),
        "grad_norm": stats.grad_norm,
        "direction_norm": torch.cat([p.grad.flatten() for p in model.parameters()]).norm(),
        "negative_weights": (stats.weights < 0).sum(),
        "noise_scale": stats.noise_scale if stats.noise_scale > 0 else math.nan,
        "grad_snr": 8 / stats.noise_scale if stats.noise_scale > 0 else math.nan,
        **dict(zip(monitor.QUANTILES, quantiles, strict=True)),
    }
    run = monitor.read(path)
    assert run.keys() == expected.keys()
    for name, value in expected.items():
        assert run[name].tolist() == pytest.approx([float(value)], rel=1e-8, nan_ok=True), name


@pytest.mark.parametrize("loss", [2.5, torch.tensor(2.5), torch.tensor([[2.5]], dtype=torch.bfloat16), np.float32(2.5)])
def test_loss_is_a_number_or_a_tensor_with_one_element(loss, model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        backward(model)
        record.log(loss)
    assert monitor.read(path)["loss"].tolist() == [2.5]


def test_cells_without_a_number_are_empty(path):
    model = torch.nn.LayerNorm(6, dtype=torch.float64)  # its gradients are materialised, and Rayleigh needs no Gramian
    writer, handle = Scalars(), rgd_ext.precondition(model, epsilon=rgd_ext.Rayleigh(0.5))
    with rgd_ext.Monitor(handle, path, writer=writer) as record:
        backward(model)
        record.log()
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    empty = {"loss", "lambda_max"} | (set() if handle.stats.noise_scale > 0 else set(monitor.NOISE))
    assert {name for name, cell in row.items() if cell == ""} == empty
    assert not {f"rgd/{name}" for name in empty} & {tag for tag, _, _ in writer}


def noise_of(rows):
    """The last noise scale of rows of the batch size, |g| and tr D, from running means over all of them.

    Estimates of tr Sigma are weighted by degrees of freedom, and those of |mu|^2 by pairs of samples.
    """
    rows = np.array([*rows])
    batch_sizes, norms, traces = rows.T
    unbiased = traces * batch_sizes / (batch_sizes - 1)
    decay = np.exp(-0.01 * np.arange(len(rows)))[::-1]
    numerator = np.average(unbiased, weights=decay * (batch_sizes - 1))
    denominator = np.average(norms**2 - unbiased / batch_sizes, weights=decay * batch_sizes * (batch_sizes - 1))
    return numerator / denominator if denominator > 0 else math.nan


@pytest.mark.parametrize("capture", [rgd_ext.precondition, rgd_ext.observe])
def test_the_noise_scale_is_that_of_running_means_and_survives_a_restart(capture, path):
    model, seen = torch.nn.Linear(6, 2, dtype=torch.float64), []
    torch.nn.init.constant_(model.weight, 0.5)
    with capture(model) as handle:
        for batches in ((8, 4, 16), (8, 8)):
            with rgd_ext.Monitor(handle, path) as record:
                for batch in batches:
                    record.log(backward(model, batch))
                    stats = handle.stats
                    seen.append((batch, stats.grad_norm.item(), stats.trace.item()))
    run = monitor.read(path)
    expected = [noise_of(seen[: row + 1]) for row in range(len(seen))]
    assert any(value > 0 for value in expected)
    assert run["noise_scale"].tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_rows_that_are_replaced_count_no_more_in_the_noise_scale(path):
    model, seen = torch.nn.Linear(6, 2, dtype=torch.float64), {}
    torch.nn.init.constant_(model.weight, 0.5)
    with rgd_ext.observe(model) as handle, rgd_ext.Monitor(handle, path) as record:
        for step in (0, 1, 2, 3, 1, 2):
            record.log(backward(model), step)
            seen = {s: row for s, row in seen.items() if s < step}
            seen[step] = 8, handle.stats.grad_norm.item(), handle.stats.trace.item()
    assert monitor.read(path)["noise_scale"][-1] == pytest.approx(noise_of(seen.values()), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [((1j,), TypeError, "loss"), ((torch.tensor(1j),), TypeError, "real"), ((1.0, 10**400), ValueError, "at most")],
    ids=["complex", "complex tensor", "step"],
)
def test_numbers_that_no_row_can_hold_are_refused(arguments, error, message, model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        backward(model)
        with pytest.raises(error, match=message):
            record.log(*arguments)
    assert path.read_text() == HEADER


def test_one_sample_adds_nothing_to_the_noise_scale(path):
    model = torch.nn.Linear(6, 2, dtype=torch.float64)
    with rgd_ext.observe(model) as handle, rgd_ext.Monitor(handle, path) as record:
        record.log(backward(model, 1))
    assert math.isnan(monitor.read(path)["noise_scale"].item())


def test_numbers_of_a_diverged_run_are_recorded(model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        with pytest.warns(UserWarning, match="could not be verified: its outputs are not finite"):
            loss = model(torch.full((8, 6), math.nan, dtype=torch.float64)).square().mean()
        loss.backward()
        record.log(loss)
    assert math.isnan(monitor.read(path)["trace"].item())


def test_writer_gets_the_numbers_of_the_file(model, handle, path):
    writer = Scalars()
    with rgd_ext.Monitor(handle, path, writer=writer) as record:
        record.log(backward(model), step=7)
    run = monitor.read(path)
    assert {tag for tag, _, _ in writer} == {f"rgd/{name}" for name in monitor.COLUMNS if name != "step"}
    for tag, value, step in writer:
        assert (value, step) == (pytest.approx(run[tag.removeprefix("rgd/")].item(), rel=1e-8), 7)


def test_a_row_is_one_transfer(model, handle, path, monkeypatch):
    backward(model)  # verified
    transfers = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor) or tolist(tensor))
    for name in ("item", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} synchronises"))
    loss = backward(model)
    with rgd_ext.Monitor(handle, path) as record:
        record.log(loss)
    assert len(transfers) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_row_waits_for_the_device_once(path):
    model = mlp().cuda()
    with rgd_ext.precondition(model) as handle, rgd_ext.Monitor(handle, path) as record:
        loss = model(torch.randn(8, 6, device="cuda")).square().mean()
        loss.backward()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing") as waits:
                record.log(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


def test_steps_count_on_from_the_one_given(model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        for step in (None, None, 10, None, np.int64(20)):
            record.log(backward(model), step)
    assert steps_in(path) == [0, 1, 10, 11, 20]


def test_row_is_in_the_file_when_log_returns(model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        record.log(backward(model))
        assert steps_in(path) == [0]


def test_existing_file_is_continued(model, handle, path):
    for _ in range(2):
        with rgd_ext.Monitor(handle, path) as record:
            record.log(backward(model))
            record.log(backward(model))
    assert steps_in(path) == [0, 1, 2, 3]
    assert path.read_text().count("step") == 1


def test_rows_behind_a_checkpoint_that_training_went_back_to_are_replaced(path):
    write(path, 0, 1, 2, 3, 1, 2)
    assert steps_in(path) == [0, 1, 2]
    assert monitor.read(path)["loss"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("torn", ["4", "4,8,0.25,0.", "4,8,0.25,0.1" + ",1" * 12, "\0" * 5000])
def test_torn_last_line_is_dropped(torn, model, handle, path):
    write(path, 2, 3)
    whole = path.read_text()
    path.write_text(whole + torn)
    assert steps_in(path) == [2, 3]
    with rgd_ext.Monitor(handle, path) as record:
        assert path.read_text() == whole
        record.log(backward(model))
    assert steps_in(path) == [2, 3, 4]


@pytest.mark.parametrize("content", ["", HEADER[:9], HEADER.rstrip("\n"), HEADER])
def test_file_without_rows_is_begun_anew(content, model, handle, path):
    path.write_text(content)
    with rgd_ext.Monitor(handle, path) as record:
        record.log(backward(model))
    assert path.read_text().startswith(HEADER)
    assert steps_in(path) == [0]


@pytest.mark.parametrize("content", ["step,loss\n0,1\n", "notes without a line end", HEADER[:-1] + ",more\n", "\n"])
def test_file_of_other_columns_is_refused_and_left_alone(content, handle, path):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other columns, .*: pass a new file"):
        rgd_ext.Monitor(handle, path)
    assert path.read_text() == content


@pytest.mark.parametrize("step", ["x", "nan", "inf", ""])
def test_file_with_a_damaged_row_is_refused_and_left_alone(step, handle, path):
    write(path, 0, step)
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"line 3 of .* is damaged, '{step},.*: delete it"):
        rgd_ext.Monitor(handle, path)
    assert path.read_text() == before


CHILD = """
import sys, torch, rgd_ext
model = torch.nn.Linear(4, 3)
handle = rgd_ext.precondition(model)
record = rgd_ext.Monitor(handle, sys.argv[1])
while True:
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    record.log(loss)
"""


def test_killed_run_leaves_whole_rows_and_is_continued(model, handle, path):
    with subprocess.Popen([sys.executable, "-c", CHILD, str(path)]) as child:
        end = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 50:
            assert child.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    *lines, rest = path.read_text().split("\n")
    assert rest == ""
    assert {line.count(",") for line in lines} == {len(monitor.COLUMNS) - 1}
    with rgd_ext.Monitor(handle, path) as record:
        record.log(backward(model))
    assert steps_in(path) == list(range(len(lines)))


def test_row_that_does_not_fit_on_the_disk_is_taken_back(model, handle, path, monkeypatch):
    class Full(monitor.FileIO):
        def write(self, line):
            return super().write(line if line == HEADER.encode() else line[:10])

    monkeypatch.setattr(monitor, "FileIO", Full)
    with rgd_ext.Monitor(handle, path) as record:
        loss = backward(model)
        for _ in range(2):  # nor does it count as logged
            with pytest.raises(OSError, match="only a part of a row"):
                record.log(loss)
    assert path.read_text() == HEADER


def test_row_without_a_backward_is_refused(model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        with pytest.raises(RuntimeError, match="no backward of the captured model yet"):
            record.log()
        loss = backward(model)
        record.log(loss)
        with pytest.raises(RuntimeError, match="no backward since the row of step 0"):
            record.log(loss)
        record.log(backward(model))
    assert steps_in(path) == [0, 1]


def test_a_written_union_is_one_row(model, handle, path):
    handle.defer()
    with rgd_ext.Monitor(handle, path) as record:
        for _ in range(2):
            for _ in range(2):
                loss = backward(model)
                with pytest.raises(RuntimeError, match=r"after handle\.write\(\)"):
                    record.log(loss)
            handle.write()
            record.log(loss)
    assert monitor.read(path)["batch_size"].tolist() == [16, 16]


def test_accumulated_batches_are_one_row(model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        record.log(backward(model))
        with handle.accumulate():
            for _ in range(2):
                loss = backward(model)
                with pytest.raises(RuntimeError, match=r"after the block of handle.accumulate\(\)"):
                    record.log(loss)
        record.log(loss)
    assert monitor.read(path)["batch_size"].tolist() == [8, 16]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"loss is of shape \(3,\)", {"loss": torch.zeros(3)}),
        (TypeError, "loss is of type str", {"loss": "0.5"}),
        (TypeError, "step is 1.5: pass a whole number", {"step": 1.5}),
    ],
)
def test_bad_arguments_write_nothing(error, message, arguments, model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        backward(model)
        with pytest.raises(error, match=message):
            record.log(**arguments)
        assert path.read_text() == HEADER
        record.log()
    assert steps_in(path) == [0]


def test_closed_monitor_is_refused(model, handle, path):
    with rgd_ext.Monitor(handle, path) as record:
        backward(model)
    with pytest.raises(RuntimeError, match="is closed"):
        record.log()


def test_wrong_handle_and_writer_are_refused_before_a_file_is_made(model, path):
    optimizer = rgd_ext.RGD(model, lr=0.1)
    with pytest.raises(TypeError, match=r"handle is of type RGD: .*optimizer\.preconditioner"):
        rgd_ext.Monitor(optimizer, path)
    with pytest.raises(TypeError, match="writer is of type str, without add_scalar"):
        rgd_ext.Monitor(optimizer.preconditioner, path, writer="runs")
    with pytest.raises(TypeError, match="writer is the class Scalars: pass an instance"):
        rgd_ext.Monitor(optimizer.preconditioner, path, writer=Scalars)
    assert not path.exists()
