"""The packages, each in a file, used as its documentation says."""

from __future__ import annotations

from . import backpack, curvlinops, func, opacus, ours, torchjd

PACKAGES = {
    "rgd_ext": ours.PACKAGE,
    "Opacus": opacus.PACKAGE,
    "torch.func": func.PACKAGE,
    "BackPACK": backpack.PACKAGE,
    "TorchJD": torchjd.PACKAGE,
    "curvlinops": curvlinops.PACKAGE,
}
