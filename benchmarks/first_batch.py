"""Prints the seconds from the construction of a loader to its first batch, in a new process with
warm caches."""

import sys
import time

sys.path.insert(0, __file__.rsplit("/", 2)[0])
import contestants

kind, path, threads, rand_augment = sys.argv[1:]
if kind == "Ours":
    import rsb_ffcv.loading  # noqa: F401  imports are not timed, for either loader
else:
    import ffcv.fields.rgb_image
    import ffcv.loader
    import ffcv.transforms  # noqa: F401
started = time.perf_counter()
loader = getattr(contestants, kind)(
    path, int(threads), **({"rand_augment": rand_augment} if rand_augment else {})
).loader
next(iter(loader.epoch(0) if kind == "Ours" else loader))
print(time.perf_counter() - started)
