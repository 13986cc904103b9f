"""Recorders, which stand in for the forwards of modules while their model is captured."""
