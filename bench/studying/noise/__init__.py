"""The gradient noise scale: how well it is known from batches, and how well it predicts the critical batch size."""
