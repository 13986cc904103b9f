"""Published data sets, and where a folder of the user has them. Nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import formats
from .formats import File, Images


@dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        name: as in configurations.
        train: the MD5s of its files' contents by the files' names, in the order in which `read` takes them. They are
            of the contents without compression, which differs between mirrors.
        test: likewise.
        read: gives the images of the files of either part.
        archive: the tar file that has all files, if they are published so.
    """

    name: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    read: Callable[[Sequence[File]], Images]
    archive: str | None = None

    @property
    def md5(self) -> dict[str, str]:
        return {**self.train, **self.test}


def load(folder: Path, data_set: DataSet) -> tuple[Images, Images]:
    """The training set and the test set.

    Raises:
        ValueError: if a file is not in its format.
    """
    files = dict(_files(folder, data_set))
    train, test = ([files[name] for name in part] for part in (data_set.train, data_set.test))
    return data_set.read(train), data_set.read(test)


def found_in(folder: Path, data_sets: Sequence[DataSet]) -> list[DataSet]:
    """Those of the data sets that the folder has.

    Raises:
        ValueError: if it has none, only some files of one, or a file that differs from the published one.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one with the files of a data set")
    found = []
    # Sets whose files have the same names, as those of MNIST and Fashion-MNIST, are told apart by the contents.
    for names in dict.fromkeys(tuple(data_set.md5) for data_set in data_sets):
        alike = [data_set for data_set in data_sets if tuple(data_set.md5) == names]
        contents = {name: (file.path, _md5(file)) for name, file in _files(folder, alike[0])}
        if contents:
            found.append(_identified(folder, contents, alike))
    if not found:
        known = "; ".join(f"{data_set.name}: {_listed(data_set)}" for data_set in data_sets)
        raise ValueError(f"{folder} holds no known data set; expected are the files of one or more of {known}")
    return found


def _listed(data_set: DataSet) -> str:
    """The files that are expected, as text."""
    names = ", ".join(data_set.md5) + " (as they are, or .gz)"
    return f"{data_set.archive}, or {names}" if data_set.archive else names


def _identified(folder: Path, contents: Mapping[str, tuple[str, str]], alike: list[DataSet]) -> DataSet:
    """The data set that has these contents, given as path and MD5 by name."""
    for name in alike[0].md5:
        path, md5 = contents.get(name, (f"{folder}/{name}", None))
        matching = [data_set for data_set in alike if data_set.md5[name] == md5]
        if not matching:
            expected = " or ".join(f"{data_set.md5[name]} ({data_set.name})" for data_set in alike)
            problem = f"has the MD5 {md5}" if md5 else "is missing"
            raise ValueError(
                f"{path} {problem}; expected was a file whose content, uncompressed, has the MD5 {expected}"
            )
        alike = matching
    return alike[0]


def _md5(file: File) -> str:
    return hashlib.md5(file.content, usedforsecurity=False).hexdigest()


def _files(folder: Path, data_set: DataSet) -> Iterator[tuple[str, File]]:
    """The files of the data set that the folder has, by name, one at a time since they are large."""
    if data_set.archive and (folder / data_set.archive).is_file():
        yield from _members(folder / data_set.archive, data_set.md5)
        return
    for name in data_set.md5:
        present = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if present:
            yield name, File(str(present[0]), _uncompressed(present[0]))


def _members(path: Path, names: Mapping[str, str]) -> Iterator[tuple[str, File]]:
    """The members of a tar file that have these names, in any of its folders. Nothing is extracted to disk."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in names:
                    yield name, File(f"{path}: {name}", archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete tar file ({error}); get it again from its authors") from error


def _uncompressed(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); get it again from its authors") from error


def _idx(train_images: str, train_labels: str, test_images: str, test_labels: str) -> dict[str, Mapping[str, str]]:
    """The files of a data set in the format of MNIST, given the MD5s of their contents."""
    return {
        "train": {"train-images-idx3-ubyte": train_images, "train-labels-idx1-ubyte": train_labels},
        "test": {"t10k-images-idx3-ubyte": test_images, "t10k-labels-idx1-ubyte": test_labels},
    }


PUBLISHED = (
    # Xiao et al. (2017), https://github.com/zalandoresearch/fashion-mnist; Debian's package dataset-fashion-mnist.
    DataSet(
        "fashion-mnist",
        **_idx(
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
        read=formats.mnist,
    ),
    # LeCun et al. (1998), http://yann.lecun.com/exdb/mnist.
    DataSet(
        "mnist",
        **_idx(
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
        read=formats.mnist,
    ),
    # Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html, the binary version.
    DataSet(
        "cifar-10",
        train={
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        },
        test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        read=formats.cifar_10,
        archive="cifar-10-binary.tar.gz",
    ),
    # Netzer et al. (2011), http://ufldl.stanford.edu/housenumbers, the cropped digits.
    DataSet(
        "svhn",
        train={"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373"},
        test={"test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
        read=formats.svhn,
    ),
)
