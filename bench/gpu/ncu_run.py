"""Runs a few operators once each, at sizes that fill a GPU, for Nsight Compute, which profiles only these calls.

`ncu --profile-from-start off --clock-control none python -m bench.gpu.ncu_run [DEVICE]`; the default is cuda.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

from ..measuring.inputs import random
from .operator_inputs import INPUTS, call

SAMPLES, TOKENS, IMAGES = (128, 1_000_000), (8, 1024, 768), (64, 128, 32, 32)
RUNS = [
    *((name, SAMPLES, dtype) for name in ("moments", "combine") for dtype in (torch.float32, torch.bfloat16)),
    ("scalar_moments", SAMPLES, torch.float32),
    *(("gram", SAMPLES, dtype) for dtype in (torch.float32, torch.bfloat16)),
    ("gram", (8, 10_000_000), torch.float32),
    *(("layer_norm_grads", TOKENS, dtype) for dtype in (torch.float32, torch.bfloat16)),
    ("group_norm_grads", IMAGES, torch.float32),
    ("largest_eigenvalue", (128, 512), torch.float32),
]


def run(device: str) -> None:
    for name, shape, dtype in RUNS:
        grads = [random(shape, dtype, device)]
        arguments = INPUTS[name](grads)
        call(name, arguments)  # loads the kernels before the profile starts
        with torch.cuda.profiler.profile() if device == "cuda" else nullcontext():
            call(name, arguments)
            if device == "cuda":
                torch.cuda.synchronize()
        print(f"{name}, {shape}, {dtype}", flush=True)


if __name__ == "__main__":
    run(sys.argv[1] if len(sys.argv) > 1 else "cuda")
