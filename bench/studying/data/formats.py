"""Readers of file formats, from bytes to arrays of images and labels. None of them can run code (no pickles)."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

CLASSES = 10  # of all the data sets

Bytes = NDArray[np.uint8]
# Pixels from 0 to 255, (N, channels, height, width), and labels from 0 to 9, (N,).
Images = tuple[Bytes, Bytes]


@dataclass(frozen=True)
class File:
    """A file's content, without the compression around it, and where it is, for messages."""

    path: str
    content: bytes

    def require(self, condition: bool, problem: str) -> None:
        """Raise a ValueError that names the file and the problem, unless the condition holds."""
        if not condition:
            raise ValueError(f"{self.path}: {problem}; get the file again from its authors")


def labelled(file: File, pixels: Bytes, labels: Bytes) -> Images:
    """The images with their labels, of which `file` has the latter."""
    file.require(len(labels) == len(pixels), f"{len(labels)} labels of {len(pixels)} images")
    file.require(labels.max(initial=0) < CLASSES, f"the labels go up to {labels.max(initial=0)}, not {CLASSES - 1}")
    return pixels, labels


def idx(file: File, dimensions: int) -> Bytes:
    """An array of that many dimensions in IDX, the format of MNIST.

    The file is 0, 0, the code 8 of unsigned bytes, the number of dimensions, the sizes as big-endian int32, the data.
    """
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    file.require(file.content[:4] == magic, f"it begins with {file.content[:4].hex()}, not {magic.hex()}")
    file.require(len(file.content) >= start, f"it ends within the header of {start} bytes")
    shape = struct.unpack(f">{dimensions}I", file.content[4:start])
    file.require(
        len(file.content) - start == prod(shape),
        f"{len(file.content) - start} bytes of data, but the header has the shape {shape}",
    )
    return np.frombuffer(file.content, np.uint8, offset=start).reshape(shape)


def mnist(files: Sequence[File]) -> Images:
    """A file of images and one of labels, in IDX."""
    images, labels = files
    return labelled(labels, idx(images, 3)[:, None], idx(labels, 1))


def cifar_10(files: Sequence[File]) -> Images:
    """Files in the binary version of CIFAR-10: a byte with the label and 3 x 32 x 32 pixels for each image."""
    batches = [_cifar_10_batch(file) for file in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return pixels, labels


def _cifar_10_batch(file: File) -> Images:
    shape = (3, 32, 32)
    size = 1 + prod(shape)
    file.require(
        len(file.content) > 0 and len(file.content) % size == 0,
        f"{len(file.content)} bytes are not a multiple of the {size} bytes of a record",
    )
    records = np.frombuffer(file.content, np.uint8).reshape(-1, size)
    return labelled(file, records[:, 1:].reshape(-1, *shape), records[:, 0])


def svhn(files: Sequence[File]) -> Images:
    """A MATLAB file with cropped digits: X, (32, 32, 3, N), and y, (N, 1), in which 10 stands for the digit 0."""
    (file,) = files
    try:
        arrays = loadmat(io.BytesIO(file.content), variable_names=("X", "y"))
    # On a damaged file, scipy raises errors of several kinds, from those of zlib to TypeError.
    except Exception as error:
        raise ValueError(f"{file.path}: not a MATLAB file ({error}); get the file again from its authors") from error
    file.require(arrays.keys() >= {"X", "y"}, "it has no X and y")
    pixels, digits = arrays["X"], arrays["y"]
    file.require(
        pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[:3] == (32, 32, 3),
        f"X has the shape {pixels.shape} and type {pixels.dtype}, not (32, 32, 3, N) and uint8",
    )
    # Other values than digits, of any type and sign, are outside the range that `labelled` allows.
    file.require(digits.dtype == np.uint8, f"y has the type {digits.dtype}, not uint8")
    file.require(digits.min(initial=10) >= 1, "y has zeros, but the digit 0 is written as 10")
    labels = np.where(digits == 10, 0, digits).astype(np.uint8).reshape(-1)
    return labelled(file, pixels.transpose(3, 2, 0, 1), labels)
