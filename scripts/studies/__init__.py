"""Experiments with conclusions: the figures and tables of the README and of docs/."""
