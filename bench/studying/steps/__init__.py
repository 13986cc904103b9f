"""Single steps from a point of a training: what they are made of, and what they do to the loss."""
