"""The choice of the fastest strategy for every parameter."""
