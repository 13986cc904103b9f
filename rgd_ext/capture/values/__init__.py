"""Values that all samples share, such as raw parameters, whose gradients arrive per sample."""
