"""Checks of the operators and of their machine code on a GPU. Nothing here is timed; bench/gpu_check.sh runs them."""
