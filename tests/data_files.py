"""Small files in the formats of published data sets, and the tables of data sets that name them."""

import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np
from scipy.io import savemat

from bench.studying.data import formats
from bench.studying.data.published import DataSet

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


IMAGES, LABELS = TRAIN
GOOD = idx_files()
