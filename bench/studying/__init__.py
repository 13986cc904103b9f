"""The study of trainings along (I - eps D) g: data, models, methods, runs and their report."""
