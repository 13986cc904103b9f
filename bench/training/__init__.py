"""Models, and ways to make a training step on them: RGD, SGD and other packages."""
