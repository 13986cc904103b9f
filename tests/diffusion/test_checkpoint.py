"""Checkpoints: interrupted passes continue, and those of another model or of other data are refused."""

import pytest
import torch
from diffusing import Counting, batches, case
from oracle import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rgd_ext import DiffusionMatrix
from rgd_ext.diffusion import spectrum, stream
from rgd_ext.diffusion.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(model):
    """Counts the samples that a model is evaluated on for their gradients."""
    count = [0]

    def add(module, inputs):
        count[0] += len(inputs[0]) * torch.is_grad_enabled()

    model.register_forward_pre_hook(add)
    return count


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 4, 5, 8, 20])
def test_killed_and_resumed_equals_uninterrupted(fail_at, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(spectrum, "_EXACT", 3)
    model, loss, x, y = case(size=9)
    expected = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 4))
    expected = [expected.trace(), expected.spectrum(2), expected @ torch.ones(expected.shape[0]).double()]

    def run(loader):
        matrix = DiffusionMatrix.from_dataset(model, loss, loader, checkpoint=tmp_path / "run")
        return [matrix.trace(), matrix.spectrum(2), matrix @ torch.ones(matrix.shape[0]).double()]

    with pytest.raises(KeyboardInterrupt):
        run(Counting(batches(x, y, 4), fail_at))
    evaluated = seen(model)
    resumed = run(batches(x, y, 4))
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))
    first, evaluated[0] = evaluated[0], 0
    again = run(batches(x, y, 4))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert evaluated[0] == 4  # the first batch, to know the data
    passes = len(list((tmp_path / "run").glob("*.pt"))) - 1
    done = min(4 * fail_at, 9) if fail_at < 3 else 9 * (fail_at // 3) + 4 * (fail_at % 3)
    assert first == 9 * passes - done + 4 * (fail_at > 0)


def test_a_write_that_is_killed_leaves_the_old_content(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "folder", "me")
    checkpoint.save("result", {"state": torch.ones(2)})

    def torn(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save("result", {"state": torch.zeros(2)})
    assert checkpoint.load("result")["state"].all()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, loss, x, y = case()
    path = tmp_path / "run"
    DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=path).trace()
    for other in (batches(x + 1, y, 3), batches(x, 2 - y, 3), batches(x, y, 4)):
        with pytest.raises(ValueError, match="belongs to other data or another loss"):
            DiffusionMatrix.from_dataset(model, loss, other, checkpoint=path).trace()
    with pytest.raises(ValueError, match="belongs to other data or another loss"):
        DiffusionMatrix.from_dataset(
            model, nn.CrossEntropyLoss(label_smoothing=0.1), batches(x, y, 3), checkpoint=path
        ).trace()
    with torch.no_grad():
        model[0].bias += 1e-6
    with pytest.raises(ValueError, match="another model or other weights"):
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=tmp_path / "file")


def test_any_other_data_in_a_finished_checkpoint_is_refused(tmp_path):
    model, loss, x, y = case(size=9)
    path, vector = tmp_path / "run", torch.ones(sum(p.numel() for p in model.parameters())).double()
    first = DiffusionMatrix.from_dataset(model, loss, batches(x[:6], y[:6], 3), checkpoint=path)
    values = [first.trace(), first @ vector]
    changed = x[:6].clone()
    changed[5, 0] += 1e-6
    for other in ((x, y), (x[:3], y[:3]), (changed, y[:6])):  # more samples, fewer, and one that differs
        matrix = DiffusionMatrix.from_dataset(model, loss, batches(*other, 3), checkpoint=path)
        for call in (matrix.trace, lambda matrix=matrix: matrix @ vector):
            with pytest.raises(ValueError, match=r"run belongs to other data.*pass another path"):
                call()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x[:6], y[:6], 3), checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip([matrix.trace(), matrix @ vector], values, strict=True))


def test_a_checkpoint_and_a_loader_that_shuffles_do_not_agree(tmp_path):
    model, loss, x, y = case()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    for match in (None, r"belongs to other data.*batch \d differs.*the loader shuffles or augments"):
        matrix = DiffusionMatrix.from_dataset(model, loss, loader, checkpoint=tmp_path)
        if match is None:
            matrix.trace()
        else:
            with pytest.raises(ValueError, match=match):
                matrix.trace()


def test_other_data_in_an_unfinished_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_SAVE_EVERY", 0.0)
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, Counting(batches(x, y, 2), fail_at=2), checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        matrix.trace()
    changed = x.clone()
    changed[3] += 1
    for other in (changed, x[:2]):
        with pytest.raises(ValueError, match="belongs to other data"):
            DiffusionMatrix.from_dataset(model, loss, batches(other, y[: len(other)], 2), checkpoint=tmp_path).trace()
    changed = x.clone()
    changed[4] += 1  # not seen yet
    resumed = DiffusionMatrix.from_dataset(model, loss, batches(changed, y, 2), checkpoint=tmp_path)
    assert_close(resumed.trace(), DiffusionMatrix.from_batch(model, loss, changed, y).trace())


def test_products_of_other_data_than_the_moments_are_refused(tmp_path):
    model, loss, x, y = case()
    vector = torch.ones(sum(p.numel() for p in model.parameters())).double()
    DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=tmp_path) @ vector
    (tmp_path / "moments.pt").unlink()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x + 1, y, 3), checkpoint=tmp_path)
    matrix.trace()
    with pytest.raises(ValueError, match=r"product-\w+\.pt is of other data"):
        matrix @ vector


@pytest.mark.parametrize("content", [b"", b"half", bytes(100), slice(0, 200), slice(0, -1)], ids=range(5))
def test_a_damaged_checkpoint_file_is_named_with_the_remedy(content, tmp_path):
    model, loss, x, y = case()

    def trace():
        return DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), checkpoint=tmp_path).trace()

    expected = trace()
    for name in ("moments", "identity"):
        file = tmp_path / f"{name}.pt"
        whole = file.read_bytes()
        file.write_bytes(whole[content] if isinstance(content, slice) else content)
        with pytest.raises(ValueError, match=rf"{name}\.pt is damaged: delete it"):
            trace()
        file.unlink()
        if name == "moments":
            assert torch.equal(trace(), expected)
    with pytest.raises(ValueError, match="another model or other weights"):  # nobody knows whose the others are
        trace()
