"""Runs every operator that has a compiled kernel once, on small odd shapes in all dtypes, for compute-sanitizer.

`python -m bench.gpu.sanitized_run [DEVICE [DTYPE...]]` runs all dtypes on cuda by default. Inputs are made on the CPU
and results are copied back, so that almost all kernels on the device are ours and every output is read.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._pytree import tree_leaves

from ..measuring.inputs import random
from .operator_inputs import DTYPES, INPUTS, call, compiled

SHAPES = {
    "one": [(5, 1031)],
    "many samples": [(130, 67)],
    "row slices": [(9, 64), (9, 8)],  # rows start on 16 bytes and end inside them
    "few tensors": [(7, 3, 5), (7, 1), (7, 0), (7, 129)],
    "many tensors": [(3, 1 + 7 * index) for index in range(70)],
}


def run(device: str, dtypes: list[torch.dtype]) -> None:
    names = compiled(device)
    if not names:
        sys.exit(f"no operator has a kernel for {device}: build rgd_ext with them")
    for dtype in dtypes:
        for what, shapes in SHAPES.items():
            grads = [random(shape, dtype).to(device) for shape in shapes]
            if what == "row slices":
                grads = [g[:, :-3] for g in grads]
            for name in names:
                result = call(name, INPUTS[name](grads))
                if not all(leaf.cpu().isfinite().all() for leaf in tree_leaves(result)):
                    sys.exit(f"{name} of {what}, {dtype}: not finite")
            print(f"{dtype}, {what}: every operator ran", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    device, *names = sys.argv[1:] or ["cuda"]
    run(device, [getattr(torch, name) for name in names] or list(DTYPES))
