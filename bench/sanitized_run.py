"""Every operator once on small odd shapes in all dtypes, for compute-sanitizer.

`python -m bench.sanitized_run [DEVICE]`, cuda by default.
Inputs are made on the CPU and results copied back, so that almost all kernels seen are ours and every output is read.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._pytree import tree_leaves

from rgd_ext import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = {
    "one": [(5, 1031)],
    "many samples": [(130, 67)],
    "row slices": [(9, 64), (9, 8)],  # rows start on 16 bytes and end inside them
    "few tensors": [(7, 3, 5), (7, 1), (7, 0), (7, 129)],
    "many tensors": [(3, 1 + 7 * index) for index in range(70)],
}


def run(device: str) -> None:
    for what, shapes in SHAPES.items():
        for dtype in DTYPES:
            grads = [torch.randn(shape).to(dtype).to(device) for shape in shapes]
            if what == "row slices":
                grads = [g[:, :-3] for g in grads]
            weights = torch.randn(len(grads[0])).to(device)
            vectors = [torch.randn(3, *g.shape[1:]).to(dtype).to(device) for g in grads]
            rows = [g.flatten(1) for g in grads]
            statistics = ops.gram_moments(ops.gram(grads))
            epsilon = torch.tensor(0.1).to(device)
            results = {
                "moments": ops.moments(grads),
                "scalar_moments": ops.scalar_moments(grads),
                "combine": ops.combine(grads, weights),
                "diffusion_mv": ops.diffusion_mv(grads, vectors),
                "gram": ops.gram(grads),
                "largest_eigenvalue": ops.largest_eigenvalue(ops.gram(grads)),
                "precondition": ops.precondition(grads, epsilon),
                "ghost_gram": ops.ghost_gram(rows, rows[::-1], [True] * len(rows)),
                "gram_moments": statistics,
                "sample_weights": ops.sample_weights(*statistics[:3], epsilon.double(), 1e-7),
                "group_norm_grads": ops.group_norm_grads(grads[0], grads[0], 1, 1e-5),
                "layer_norm_grads": ops.layer_norm_grads(grads[0], grads[0], 1e-5),
            }
            for name, result in results.items():
                if not all(leaf.cpu().isfinite().all() for leaf in tree_leaves(result)):
                    sys.exit(f"{name} of {what}, {dtype}: not finite")


if __name__ == "__main__":
    torch.manual_seed(0)
    run(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    print("every operator ran")
