"""Files of data sets in their formats, and those that are damaged."""

import io

import numpy as np
import pytest
import torch
from data_files import (
    ARCHIVE,
    BATCHES,
    GOOD,
    IMAGES,
    LABELS,
    cifar_files,
    idx,
    idx_files,
    like_cifar,
    like_mnist,
    like_svhn,
    mat,
    random_images,
    svhn_files,
    unequal_labels,
    write,
    write_archive,
    zipped,
)
from scipy.io import savemat

from bench.studying.data import Sources, formats


@pytest.mark.parametrize("as_stored", [dict, zipped])
def test_idx_files_give_their_images_and_labels(tmp_path, as_stored):
    files = idx_files()
    train, test = Sources([write(tmp_path, as_stored(files))], [like_mnist(files)]).load("like MNIST")
    pixels = random_images(unequal_labels(), 2, 3)
    assert train.inputs.dtype == torch.float32
    assert train.labels.dtype == torch.int64
    np.testing.assert_allclose(train.inputs.numpy(), pixels[:, None] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(train.labels.numpy(), unequal_labels())
    assert test.inputs.shape == (20, 1, 2, 3)
    assert test.labels.tolist() == list(range(10)) * 2


@pytest.mark.parametrize("put", [write, write_archive])
def test_cifar_records_give_channels_before_rows(tmp_path, put):
    files = cifar_files()
    train, test = Sources([put(tmp_path, files)], [like_cifar(files)]).load("like CIFAR-10")
    assert train.labels.tolist() == [0, 9, 1, 9]
    assert test.labels.tolist() == [2, 9]
    pixels = ((train.inputs + 1) * 127.5).round()
    # The byte after the label is number 0 of 3,072, of which each channel has 1,024 and each row of it 32.
    assert pixels[0, 2, 3, 4] == (2 * 1024 + 3 * 32 + 4) % 256
    assert (pixels[3] == 1).all()


def test_svhn_files_give_images_first_and_zero_for_the_digit_0(tmp_path):
    files = svhn_files()
    train, _ = Sources([write(tmp_path, files)], [like_svhn(files)]).load("like SVHN")
    pixels = random_images([1, 10, 9], 32, 32, 3)
    assert train.labels.tolist() == [1, 0, 9]
    np.testing.assert_allclose(train.inputs.numpy(), pixels.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)


DAMAGED_IDX = {
    "magic": (IMAGES, b"\0\0\x0d\3" + GOOD[IMAGES][4:], "begins with 00000d03"),
    "dimensions": (LABELS, GOOD[IMAGES], "begins with 00000803, not 00000801"),
    "no data": (LABELS, GOOD[LABELS][:6], "ends within the header"),
    "truncated": (IMAGES, GOOD[IMAGES][:-1], "20099 bytes of data"),
    "extra byte": (LABELS, GOOD[LABELS] + b"\0", "3351 bytes of data"),
    "label 10": (LABELS, GOOD[LABELS][:-1] + b"\x0a", "labels go up to 10"),
    "too few labels": (LABELS, idx(unequal_labels()[:-1]), "3349 labels of 3350 images"),
}


@pytest.mark.parametrize(("name", "content", "problem"), DAMAGED_IDX.values(), ids=DAMAGED_IDX)
def test_a_damaged_idx_file_is_named(tmp_path, name, content, problem):
    files = {**GOOD, name: content}
    sources = Sources([write(tmp_path, files)], [like_mnist(files)])
    with pytest.raises(ValueError, match=rf"{name}: .*{problem}"):
        sources.load("like MNIST")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "0 bytes"), (bytes(3072), "3072 bytes"), (bytes(3074), "3074 bytes"), (b"\x0a" + bytes(3072), "up to 10")],
)
@pytest.mark.parametrize("put", [write, write_archive])
def test_a_damaged_cifar_file_is_named(tmp_path, put, content, problem):
    files = {**cifar_files(), BATCHES[1]: content}
    sources = Sources([put(tmp_path, files)], [like_cifar(files)])
    with pytest.raises(ValueError, match=rf"{BATCHES[1]}: .*{problem}"):
        sources.load("like CIFAR-10")


PIXELS, DIGITS = np.zeros((32, 32, 3, 2), np.uint8), np.array([[1], [2]], np.uint8)
DAMAGED_MAT = {
    "truncated": (mat(PIXELS, DIGITS)[:200], "not a MATLAB file"),
    "other content": (b"x" * 1000, "not a MATLAB file"),
    "shape": (mat(PIXELS[:, :31], DIGITS), r"shape \(32, 31, 3, 2\)"),
    "type": (mat(PIXELS.astype(float), DIGITS), "float64"),
    "too few labels": (mat(PIXELS, DIGITS[:1]), "1 labels of 2 images"),
    "label 0": (mat(PIXELS, DIGITS - 1), "has zeros"),
    "label 11": (mat(PIXELS, DIGITS + 9), "up to 11"),
    "type of labels": (mat(PIXELS, DIGITS.astype(float)), "y has the type float64"),
}


@pytest.mark.parametrize(("content", "problem"), DAMAGED_MAT.values(), ids=DAMAGED_MAT)
def test_a_damaged_mat_file_is_named(tmp_path, content, problem):
    files = {**svhn_files(), "test_32x32.mat": content}
    sources = Sources([write(tmp_path, files)], [like_svhn(files)])
    with pytest.raises(ValueError, match=rf"test_32x32\.mat: .*{problem}"):
        sources.load("like SVHN")


def test_a_mat_file_without_labels_is_named():
    file = io.BytesIO()
    savemat(file, {"X": PIXELS})
    with pytest.raises(ValueError, match=r"place: it has no X and y"):
        formats.svhn([formats.File("place", file.getvalue())])


@pytest.mark.parametrize("cut", [slice(0, 5), slice(0, -9), slice(1, None)])
def test_a_damaged_gzip_file_is_named(tmp_path, cut):
    files = zipped(GOOD)
    files[f"{IMAGES}.gz"] = files[f"{IMAGES}.gz"][cut]
    with pytest.raises(ValueError, match=rf"{IMAGES}\.gz is not a complete gzip file"):
        Sources([write(tmp_path, files)], [like_mnist(GOOD)])


def test_a_truncated_archive_is_named(tmp_path):
    path = write_archive(tmp_path, cifar_files()) / ARCHIVE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{ARCHIVE} is not a complete tar file"):
        Sources([tmp_path], [like_cifar(cifar_files())])
