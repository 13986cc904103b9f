"""Predictions of training steps on many ranks: links, models, what methods send and compute, and a simulation of it."""
