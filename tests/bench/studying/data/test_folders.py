"""Which data sets a folder has, by the contents of its files."""

from dataclasses import replace

import pytest
import torch
from data_files import (
    ARCHIVE,
    GOOD,
    LABELS,
    TEST,
    cifar_files,
    idx_files,
    like_cifar,
    like_mnist,
    like_svhn,
    svhn_files,
    write,
    write_archive,
    zipped,
)

from bench.studying.data import Sources, formats


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
