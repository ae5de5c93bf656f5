"""Drivers of experiments, and what writes parts of the documentation."""
