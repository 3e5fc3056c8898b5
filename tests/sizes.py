"""The number of repetitions of randomized tests, and whether `long` tests run. `make test` uses the
small numbers and skips `long` tests. `make test-all` sets RSB_LONG=1, which selects the large
numbers and all tests. An environment variable for each number overrides it."""

import os

LONG = os.environ.get("RSB_LONG") == "1"


def _size(variable: str, short: int, long: int) -> int:
    return int(os.environ.get(variable, long if LONG else short))


# kills of runs with one process, and of conversions; a fifth of this number with two processes
KILLS = _size("RSB_KILLS", 12, 300)
# damaged images, for vector code and again for portable code; a tenth of this number of files
FUZZ_INPUTS = _size("RSB_FUZZ_INPUTS", 4000, 100_000)
# cuts of nodes of a job that goes on without them (long)
CUTS = _size("RSB_CUTS", 30, 30)
