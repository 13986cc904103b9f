"""Statistics by the place of each sample in the data set, in a file that grows batch by batch."""

import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from capturing import double, loss_of
from models import mlp
from oracle import flat, per_sample_gradients

import rgd_ext
from rgd_ext.capture.sample_record import ROW

SIZE = 12


@pytest.fixture
def model():
    return mlp().double()


@pytest.fixture
def x():
    return double(SIZE, 6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "epoch.npy"


def epoch(handle, model, x, batches):
    for index in batches:
        loss_of(model(x[index])).backward()
        handle.record(index)


def assert_rows_of(rows, gradients, of=slice(None)):
    """The rows of some samples of a batch have the statistics of its per-sample gradients, (B, d)."""
    g = gradients.mean(0)
    np.testing.assert_array_equal(rows["batch_size"], len(gradients))
    expected = {
        "grad_norm": g.norm().expand(len(gradients)),
        "trace": gradients.var(0, correction=0).sum().expand(len(gradients)),
        "sample_norms": gradients.norm(dim=1),
        "alignments": (gradients - g) @ g,
        "squared_norms": (gradients - g).square().sum(1),
        "weights": torch.full((len(gradients),), 1 / len(gradients), dtype=torch.float64),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(rows[name], values.numpy()[of], rtol=1e-9, atol=1e-12, err_msg=name)


def test_each_sample_has_its_row_whatever_the_order(model, x, path):
    vectors = [torch.randn_like(p) for p in model.parameters()]
    batches = torch.randperm(SIZE).split(5)
    with rgd_ext.observe(model) as handle:
        handle.align(vectors)
        handle.record_to(path, SIZE)
        epoch(handle, model, x, batches)
    rows = np.load(path)
    assert rows.shape == (SIZE,)
    for index in batches:
        gradients = per_sample_gradients(model, loss_of, [x[index]])
        assert_rows_of(rows[index.numpy()], gradients)
        np.testing.assert_allclose(rows["aligned"][index.numpy()], (gradients @ flat(vectors)).numpy(), rtol=1e-9)


def test_rows_that_were_not_recorded_are_empty(model, x, path):
    with rgd_ext.observe(model) as handle:
        handle.record_to(str(path), SIZE)
        assert not np.load(path)["batch_size"].any()
        epoch(handle, model, x, [[3, 1]])
    rows = np.load(path)
    assert rows["batch_size"].nonzero()[0].tolist() == [1, 3]
    for name in ROW.names[1:]:
        assert np.isnan(np.delete(rows[name], [1, 3])).all()
    assert np.isnan(rows["aligned"]).all()


def test_a_union_is_recorded_in_the_order_of_its_batches(model, x, path):
    index = torch.tensor([7, 2, 9, 0, 4])
    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        with handle.accumulate():
            for part in index.split(2):
                (loss_of(model(x[part])) * len(part) / 5).backward()
        handle.record(index)
    assert_rows_of(np.load(path)[index.numpy()], per_sample_gradients(model, loss_of, [x[index]]))


def test_a_file_is_continued_and_rows_are_replaced(model, x, path):
    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        epoch(handle, model, x, [range(0, 4), range(4, 8)])
    first = np.load(path)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        assert np.load(path).tobytes() == first.tobytes()
        epoch(handle, model, x, [range(4, 12)])
    rows = np.load(path)
    assert rows[:4].tobytes() == first[:4].tobytes()
    assert_rows_of(rows[4:], per_sample_gradients(model, loss_of, [x[4:]]))


def test_each_row_is_one_write_within_a_sector(model, x, path, monkeypatch):
    pwrite, calls = os.pwrite, []

    def noted(file, data, offset):
        calls.append((len(data), offset))
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        epoch(handle, model, x, [range(SIZE)])
    assert len(calls) == SIZE
    for size, offset in calls:
        assert size == ROW.itemsize
        assert offset // 512 == (offset + size - 1) // 512
    assert path.stat().st_size % ROW.itemsize == 0


def refused(pwrite, file, data, offset):
    raise OSError("no space left")


def cut_off(pwrite, file, data, offset):
    return pwrite(file, data[:20], offset)


@pytest.mark.parametrize(("failure", "match"), [(refused, "no space left"), (cut_off, "only a part of a row fitted")])
def test_a_write_that_fails_leaves_whole_rows_and_may_be_repeated(failure, match, model, x, path, monkeypatch):
    pwrite, offsets = os.pwrite, []

    def third_fails(file, data, offset):
        offsets.append(offset)
        return failure(pwrite, file, data, offset) if len(offsets) == 3 else pwrite(file, data, offset)

    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        empty = np.load(path)
        loss_of(model(x)).backward()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", third_fails)
            with pytest.raises(OSError, match=match):
                handle.record(range(SIZE))
        rows = np.load(path)
        assert_rows_of(rows[:2], per_sample_gradients(model, loss_of, [x]), of=slice(2))
        assert rows[2:].tobytes() == empty[2:].tobytes()
        handle.record(range(SIZE))
    assert_rows_of(np.load(path), per_sample_gradients(model, loss_of, [x]))


def test_a_file_has_ordinary_permissions(model, path):
    path.with_name("other").touch()
    record(path, SIZE)
    assert path.stat().st_mode == path.with_name("other").stat().st_mode


def test_a_file_that_another_process_has_made_meanwhile_is_continued(model, x, path, monkeypatch):
    save = np.save

    def save_late(file, rows):
        monkeypatch.setattr(np, "save", save)
        with rgd_ext.observe(model) as other:
            other.record_to(path, SIZE)
            epoch(other, model, x, [range(4)])
        save(file, rows)

    monkeypatch.setattr(np, "save", save_late)
    record(path, SIZE)
    assert (np.load(path)["batch_size"][:4] == 4).all()
    assert [*path.parent.iterdir()] == [path]


def test_a_file_system_without_hard_links_will_do(path, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError))
    record(path, SIZE)
    assert [*path.parent.iterdir()] == [path]
    assert np.load(path).shape == (SIZE,)


def test_a_relative_path_stays_where_it_was(model, x, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with rgd_ext.observe(model) as handle:
        handle.record_to(path.name, SIZE)
        monkeypatch.chdir("/")
        epoch(handle, model, x, [range(SIZE)])
    assert (np.load(path)["batch_size"] == SIZE).all()


def test_sizes_may_be_integers_of_numpy(path):
    record(path, np.int64(SIZE))
    assert np.load(path).shape == (SIZE,)


def test_a_repeated_index_keeps_its_last_sample(model, x, path):
    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        epoch(handle, model, x, [[4, 5]])
        last = np.load(path)[5]
        loss_of(model(x[[4, 5]])).backward()
        handle.record([7, 7])
    assert np.load(path)[7].tobytes() == last.tobytes()


def test_a_file_that_could_not_be_made_leaves_nothing(model, path, monkeypatch):
    monkeypatch.setattr(np, "save", Mock(side_effect=OSError("no space left")))
    handle = rgd_ext.observe(model)
    with handle, pytest.raises(OSError, match="no space left"):
        handle.record_to(path, SIZE)
    assert not [*path.parent.iterdir()]


def test_statistics_are_recorded_once(model, x, path):
    with rgd_ext.observe(model) as handle:
        with pytest.raises(RuntimeError, match=r"no file to record to: call handle.record_to\(path, size\)"):
            handle.record([0])
        handle.record_to(path, SIZE)
        with pytest.raises(RuntimeError, match="no backward of the captured model yet"):
            handle.record([0])
        epoch(handle, model, x, [range(4)])
        with pytest.raises(RuntimeError, match="no backward since the last record"):
            handle.record(range(4, 8))
    assert not np.load(path)["batch_size"][4:].any()


BAD_INDICES = {
    "too few": ([0, 1], ValueError, r"index has shape \(2,\): pass the index .* of each of the 3 samples"),
    "none": ([], ValueError, r"index has shape \(0,\)"),
    "ragged": ([[0], [1, 2]], TypeError, "index is list that holds no array .*: pass the index"),
    "a tensor without numbers": (torch.arange(3, device="meta"), TypeError, "index is Tensor that holds no array"),
    "a matrix": (torch.arange(3)[None], ValueError, r"shape \(1, 3\)"),
    "fractions": ([0.0, 1.0, 2.0], TypeError, "index is of float64"),
    "flags": (torch.tensor([True, False, True]), TypeError, "index is of bool"),
    "names": (["a", "b", "c"], TypeError, "index is of <U1"),
    "negative": ([0, -1, 2], ValueError, "index has -1, outside of a data set of 12 samples"),
    "too large": (np.array([0, 12, 2]), ValueError, "index has 12, outside"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_indices_are_refused_and_nothing_is_written(case, model, x, path):
    index, error, match = BAD_INDICES[case]
    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        before = path.read_bytes()
        loss_of(model(x[:3])).backward()
        with pytest.raises(error, match=match):
            handle.record(index)
        assert path.read_bytes() == before
        handle.record(np.array([5, 6, 7], np.uint8))
    assert np.load(path)["batch_size"].nonzero()[0].tolist() == [5, 6, 7]


def other_columns(path):
    np.save(path, np.zeros(SIZE))


def record(path, size):
    with rgd_ext.observe(mlp()) as handle:
        handle.record_to(path, size)


def damage(path):
    path.write_bytes(path.read_bytes().replace(b"}", b"(", 1))


def archive(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


OTHER_FILES = {
    "text": (lambda path: path.write_text("step,loss\n"), "is not a .npy file"),
    "nothing": (lambda path: path.write_bytes(b""), "is not a .npy file"),
    "other columns": (other_columns, "holds an array of other columns"),
    "an archive": (archive, "is not a .npy file"),
    "a damaged header": (lambda path: (record(path, SIZE), damage(path)), "is not a .npy file"),
    "half an archive": (lambda path: path.write_bytes(b"PK\x03\x04"), "is not a .npy file"),
    "other size": (lambda path: record(path, SIZE + 1), "is a record of 13 samples, and size is 12"),
    "truncated": (lambda path: (record(path, SIZE), os.truncate(path, 400)), "holds an array .* or a part of one"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_files_are_left_as_they_are(case, model, x, path):
    make, match = OTHER_FILES[case]
    make(path)
    before = path.read_bytes()
    with rgd_ext.observe(model) as handle:
        with pytest.raises(ValueError, match=rf"epoch.npy {match}.*: pass a new file"):
            handle.record_to(path, SIZE)
        assert path.read_bytes() == before
        handle.record_to(path.with_name("new.npy"), SIZE)
        epoch(handle, model, x, [range(SIZE)])
    assert (np.load(path.with_name("new.npy"))["batch_size"] == SIZE).all()


def test_a_file_that_was_overwritten_or_deleted_is_noticed(model, x, path):
    with rgd_ext.observe(model) as handle:
        handle.record_to(path, SIZE)
        loss_of(model(x)).backward()
        other_columns(path)
        with pytest.raises(ValueError, match=r"has been overwritten: call handle\.record_to"):
            handle.record(range(SIZE))
        assert not np.load(path).any()
        record(path.with_name("short.npy"), SIZE)
        os.truncate(path.with_name("short.npy"), 400)
        os.replace(path.with_name("short.npy"), path)
        with pytest.raises(ValueError, match="has been overwritten"):
            handle.record(range(SIZE))
        path.unlink()
        with pytest.raises(FileNotFoundError):
            handle.record(range(SIZE))
        handle.record_to(path, SIZE)
        handle.record(range(SIZE))
    assert (np.load(path)["batch_size"] == SIZE).all()


BAD_SIZES = {0: ValueError, -3: ValueError, 2.5: TypeError, True: TypeError, "12": TypeError}


@pytest.mark.parametrize("size", BAD_SIZES, ids=repr)
def test_bad_sizes_are_refused(size, model, path):
    with rgd_ext.observe(model) as handle, pytest.raises(BAD_SIZES[size], match=f"size is {size!r}: pass the number"):
        handle.record_to(path, size)
    assert not path.exists()


def test_the_folder_has_to_exist(model, path):
    with rgd_ext.observe(model) as handle, pytest.raises(FileNotFoundError, match=r"there is no folder .*: make it"):
        handle.record_to(path / "epoch.npy", SIZE)
