"""The four pictures of the gallery, in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ...progress import progress_bar
from ..demo.data import load
from . import sample_weights, spectra, trajectories, weak_field

NOISE = 0.3


def draw_all(folder: Path, epochs: int) -> None:
    """Write the pictures to `folder`, which is made if missing, and print their paths.

    Two of them show trainings of `epochs` epochs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The tensors are too small for a second thread.
    torch.set_num_threads(1)
    names = ("trajectories", "spectrum", "weak_field", "sample_weights")
    paths = [folder / f"{name}.png" for name in names]
    clean, noisy = load(0, seed=0), load(NOISE, seed=0)
    losses = trajectories.neuron()
    with progress_bar("gallery", len(trajectories.STARTS) + 2 * epochs) as advance:
        trajectories.draw(losses, trajectories.measure(losses, advance), paths[0])
        spectra.draw(spectra.measure(clean, epochs, advance), paths[1])
        weak_field.draw(weak_field.measure(losses, clean), paths[2])
        weights = sample_weights.measure(noisy, epochs, advance)
        sample_weights.draw(weights, noisy, clean.train_labels, paths[3])
    for path in paths:
        print(path.resolve())
