"""Methods beside each other, each at the learning rate that suits it best."""
