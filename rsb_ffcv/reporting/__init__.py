"""The output of a run: log, curves, console, and trackers."""
