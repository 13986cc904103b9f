"""The data of the study and its models, on small files that the tests write."""

import gzip
import hashlib
import io
import struct
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import savemat

from bench.studying.data import Sources, formats
from bench.studying.data.published import DataSet
from bench.studying.data.sources import stratified_order
from bench.studying.models import MODELS, build

TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = ("data_batch_1.bin", "data_batch_2.bin")
ARCHIVE = "cifar-10-binary.tar.gz"
SIZES = np.arange(10) * 30 + 200  # of classes, in the training set: 3,350 samples


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def random_images(labels, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (len(labels), *shape), dtype=np.uint8)


def unequal_labels():
    return np.random.default_rng(1).permutation(np.repeat(np.arange(10, dtype=np.uint8), SIZES))


def idx_files(seed=0):
    """Contents by name, of images with 2x3 pixels."""
    train, test = unequal_labels(), np.arange(20, dtype=np.uint8) % 10
    images = (random_images(train, 2, 3, seed=seed), random_images(test, 2, 3, seed=seed + 100))
    return {TRAIN[0]: idx(images[0]), TRAIN[1]: idx(train), TEST[0]: idx(images[1]), TEST[1]: idx(test)}


def cifar_files():
    names = (*BATCHES, "test_batch.bin")
    return {name: bytes([i]) + bytes(range(256)) * 12 + bytes([9]) + bytes([i]) * 3072 for i, name in enumerate(names)}


def mat(pixels, digits):
    file = io.BytesIO()
    savemat(file, {"X": pixels, "y": digits}, do_compression=True)
    return file.getvalue()


def svhn_files(digits=(1, 10, 9)):
    digits = np.array(digits, np.uint8)[:, None]
    pixels = random_images(digits, 32, 32, 3)
    return {name: mat(pixels.transpose(1, 2, 3, 0), digits) for name in ("train_32x32.mat", "test_32x32.mat")}


def published(name, train, files, read, archive=None):
    """A data set with these files, of which those named `train` make the training set."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    rest = {name: value for name, value in md5.items() if name not in train}
    return DataSet(name, {name: md5[name] for name in train}, rest, read, archive)


def like_mnist(files, name="like MNIST"):
    return published(name, TRAIN, files, formats.mnist)


def like_cifar(files):
    return published("like CIFAR-10", BATCHES, files, formats.cifar_10, ARCHIVE)


def like_svhn(files):
    return published("like SVHN", ("train_32x32.mat",), files, formats.svhn)


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(folder, files):
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def zipped(files):
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


# Files and their formats.


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


IMAGES, LABELS = TRAIN
GOOD = idx_files()
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


# What a folder has.


def test_files_of_the_same_names_are_told_apart_by_their_contents(tmp_path):
    first, second = idx_files(seed=0), idx_files(seed=1)
    table = [like_mnist(first, "first"), like_mnist(second, "second")]
    assert Sources([write(tmp_path / "a", zipped(second))], table).names == ("digits", "second")
    folders = [tmp_path / "a", write(tmp_path / "b", first)]
    sources = Sources(folders, table)
    assert set(sources.names) == {"digits", "first", "second"}
    assert not torch.equal(sources.load("first")[0].inputs, sources.load("second")[0].inputs)


def test_a_folder_may_have_several_data_sets(tmp_path):
    table = [like_mnist(GOOD), like_cifar(cifar_files()), like_svhn(svhn_files())]
    write(tmp_path, {**GOOD, **svhn_files(), "notes.txt": b""})
    write_archive(tmp_path, cifar_files())
    assert Sources([tmp_path], table).names == ("digits", "like MNIST", "like CIFAR-10", "like SVHN")


@pytest.mark.parametrize("name", GOOD)
def test_a_file_with_another_checksum_is_named_with_those_expected(tmp_path, name):
    table = [like_mnist(GOOD, "first"), like_mnist(idx_files(seed=1), "second")]
    folder = write(tmp_path, {**GOOD, name: GOOD[name] + b"\0"})
    expected = table[0].md5[name]
    with pytest.raises(ValueError, match=rf"{name} has the MD5 \w+; .*{expected} \(first\)"):
        Sources([folder], table)


def test_a_mixture_of_two_data_sets_is_neither(tmp_path):
    other = idx_files(seed=1)
    table = [like_mnist(GOOD, "first"), like_mnist(other, "second")]
    folder = write(tmp_path, {**GOOD, TEST[0]: other[TEST[0]]})
    with pytest.raises(ValueError, match=rf"{TEST[0]} has the MD5 .* \(first\)$"):
        Sources([folder], table)


def test_a_missing_file_is_named(tmp_path):
    folder = write(tmp_path, {name: content for name, content in GOOD.items() if name != LABELS})
    with pytest.raises(ValueError, match=rf"{LABELS} is missing"):
        Sources([folder], [like_mnist(GOOD)])


def test_a_folder_without_data_is_named_with_the_files_expected(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no known data set.*mnist: train-images.*{ARCHIVE}"):
        Sources([tmp_path])
    with pytest.raises(ValueError, match="absent is not a folder"):
        Sources([tmp_path / "absent"])


def test_a_file_is_read_only_when_its_data_set_is_asked_for_and_once(tmp_path):
    reads = []

    def read(files):
        reads.append(files)
        return formats.mnist(files)

    sources = Sources([write(tmp_path, GOOD)], [replace(like_mnist(GOOD), read=read)])
    assert reads == []
    sources.load("like MNIST")
    sources.split("like MNIST", 10)
    assert len(reads) == 2  # training set and test set


# Splits.


def rows(samples):
    images = samples.inputs.flatten(1).tolist()
    return {(*image, label) for image, label in zip(images, samples.labels.tolist(), strict=True)}


@pytest.fixture
def sources(tmp_path):
    return Sources([write(tmp_path, GOOD)], [like_mnist(GOOD)])


@pytest.mark.parametrize(
    ("name", "validation", "test", "most"), [("digits", 300, 497, 1000), ("like MNIST", 2000, 20, 1350)]
)
def test_a_split_has_disjoint_sets_of_the_promised_sizes(sources, name, validation, test, most):
    split = sources.split(name, most)
    parts = (split.train, split.validation, split.test)
    assert [len(part) for part in parts] == [most, validation, test]
    distinct = [rows(part) for part in parts]
    # The images of both data sets are distinct, so that a sample in two parts would be missed in the union.
    assert len(set.union(*distinct)) == most + validation + test
    assert distinct[0] | distinct[1] <= rows(sources.load(name)[0])
    for part in parts:
        assert part.inputs.min() >= -1
        assert part.inputs.max() <= 1


@pytest.mark.parametrize("name", ["digits", "like MNIST"])
def test_every_part_has_the_shares_of_the_classes(sources, name):
    for samples in (10, 137, 1000):
        split, everything = sources.split(name, samples), sources.load(name)[0]
        shares = everything.labels.bincount() / len(everything)
        for part in (split.train, split.validation):
            assert (part.labels.bincount(minlength=10) - shares * len(part)).abs().max() < 2


def test_a_larger_training_set_contains_the_smaller_one_and_the_rest_is_the_same(sources):
    small, large = sources.split("digits", 100), sources.split("digits", 900)
    assert torch.equal(large.train.inputs[:100], small.train.inputs)
    assert torch.equal(large.train.labels[:100], small.train.labels)
    for part in ("validation", "test"):
        assert torch.equal(getattr(small, part).inputs, getattr(large, part).inputs)


def test_the_split_of_digits_stays_the_same():
    # Results that are kept belong to this split. All values are exact in float32, so that the bytes are the same.
    split = Sources().split("digits", 1000)
    content = b"".join(part.inputs.numpy().tobytes() for part in (split.train, split.validation, split.test))
    assert hashlib.md5(content).hexdigest() == "57068f4b984c8e474e9397ac24f13e7e"


@pytest.mark.parametrize("samples", [0, 1001])
def test_more_samples_than_there_are_is_an_error(samples):
    with pytest.raises(ValueError, match=f"digits has 1 to 1000 training samples .* not {samples}"):
        Sources().split("digits", samples)


def test_a_data_set_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no data set 'mnist' is there, only digits"):
        Sources().split("mnist", 10)


def test_a_stratified_order_is_a_random_permutation():
    labels = np.repeat(np.arange(3), (5, 50, 500))
    order = stratified_order(labels)
    assert sorted(order) == list(range(555))
    within = order[labels[order] == 2]
    assert abs(np.corrcoef(within, np.arange(500))[0, 1]) < 0.15


# Models.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_a_model_gives_logits_and_treats_samples_independently(name, shape):
    torch.manual_seed(0)
    model, x = build(name, shape, 7), torch.randn(4, *shape)
    assert model(x).shape == (4, 7)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_models_have_the_sizes_of_their_descriptions():
    counts = {name: sum(p.numel() for p in build(name, (1, 8, 8), 10).parameters()) for name in MODELS}
    assert counts == {"MLP": 8970, "small MLP": 1210, "CNN": 6186, "small CNN": 666}
    assert build("MLP", (1, 28, 28), 10)[1].out_features == 128


def test_weights_are_a_function_of_the_global_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return build("CNN", (1, 8, 8), 10)[0].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_an_unknown_model_is_an_error():
    with pytest.raises(ValueError, match="no model 'ResNet', only MLP"):
        build("ResNet", (1, 8, 8), 10)
