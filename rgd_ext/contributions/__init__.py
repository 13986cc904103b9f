"""What the layers of a model contribute to the per-sample gradients of its parameters."""
