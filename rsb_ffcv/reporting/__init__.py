"""The output of a run: log, curves, and console."""
