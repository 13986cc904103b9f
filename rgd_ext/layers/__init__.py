"""Layer rules, which turn the inputs and output gradients of a layer into the contributions to its parameters."""
