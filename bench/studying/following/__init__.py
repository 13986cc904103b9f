"""Paths of SGD beside flows that are said to describe them."""
