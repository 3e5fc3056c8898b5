"""How much is done by the tests that could go on for ever, and whether the `long` ones run: little
and not in `make test`, much and all in `make test-all`, which sets RSB_LONG=1. A variable of its
own sets one size alone."""

import os

LONG = os.environ.get("RSB_LONG") == "1"


def _size(variable: str, short: int, long: int) -> int:
    return int(os.environ.get(variable, long if LONG else short))


KILLS = _size(
    "RSB_KILLS", 12, 300
)  # of runs in one process, and of conversions; a fifth as many of runs in two processes
FUZZ_INPUTS = _size(
    "RSB_FUZZ_INPUTS", 4000, 100_000
)  # damaged images, twice: vector and portable code; a tenth as many files
