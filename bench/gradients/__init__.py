"""Materialised per-sample gradients, and ways to compute on them: what `python -m bench kernels` measures."""
