"""Colours of the figures that people with colour blindness can tell apart (Okabe and Ito)."""

BLUE = "#0072B2"
ORANGE = "#D55E00"
YELLOW = "#E69F00"
GREEN = "#009E73"
GREY = "#555555"
