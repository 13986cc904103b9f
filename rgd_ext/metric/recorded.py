"""The numbers of a step that records of a training have, by their names there."""

from __future__ import annotations

from .noise import NoiseScale
from .stats import Stats, on_host

# By their names in a record: those of `Stats`.
RECORDED = {
    "epsilon": "epsilon",
    "lambda_max": "largest_eigenvalue",
    "trace": "trace",
    "rayleigh": "rayleigh",
    "cosine": "cosine",
    "effective_sample_size": "effective_sample_size",
    "grad_norm": "grad_norm",
    "direction_norm": "direction_norm",
    "negative_weights": "negative_weights",
}
PREFIX = "rgd/"  # in the logs of trainers and of TensorBoard


class RunningRecord:
    """The numbers of some steps of a training, one after the other, as trainers log them."""

    def __init__(self) -> None:
        self._noise = NoiseScale()

    def of(self, stats: Stats, part: str = "") -> dict[str, float]:
        """The numbers of the next step, by "rgd/" and their names; waits for the device once.

        Those that the statistics lack are left out, and so is the noise scale as long as noise hides the gradient. It
        is from running means over the steps, since that of a single batch is hardly worth anything.

        Args:
            part: stands between "rgd/" and the names, and ends with a slash.
        """
        found = {name: float(value) for name, value in on_host(stats, *RECORDED.values()).items()}
        self._noise.add(stats.batch_size, found["grad_norm"] ** 2, found["trace"])
        values: dict[str, float | None] = {"batch_size": stats.batch_size, "noise_scale": self._noise.value}
        for name, attribute in RECORDED.items():
            values[name] = None if getattr(stats, attribute) is None else found[attribute]
        return {PREFIX + part + name: value for name, value in values.items() if value is not None}
