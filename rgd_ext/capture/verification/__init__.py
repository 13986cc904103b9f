"""The proof, on a batch of the user, that every sample gets its own gradient."""
