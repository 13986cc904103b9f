"""What `python -m bench compare` runs: models that people train, and packages that take them apart into samples."""
