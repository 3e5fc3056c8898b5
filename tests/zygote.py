"""A process that has imported the project and forks a child for each run of a test. A start then
takes a fraction of a second instead of the ten seconds of the imports, so that tests can start
hundreds of runs.

Reads one JSON request per line:

- {"start": [arguments of train_imagenet.py], "env": {...}, "out": path, "err": path,
  "largest_file": bytes or null, "prepare": Python code that runs before the program}. The reply is
  the child's process ID.
- {"wait": process ID}. The reply is its exit status, or minus the signal that killed it.

A child that is not killed writes the names of its threads to <out>.threads_<process ID>.
"""

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def serve():
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import numpy as np

    import train_imagenet
    from rsb_ffcv import exit_status
    from rsb_ffcv.loading import batch
    from rsb_ffcv.loading.order import epoch_order, group_slots
    from rsb_ffcv.ops import augment, crop, draws
    from rsb_ffcv.ops.operation import Address
    from rsb_ffcv.training import trainer  # noqa: F401
    from tests import stops

    # Loads the compiled functions once: each child would need a second for it
    slots, sides = np.arange(4), np.full(4, 50, np.int32)
    for op in (
        crop.RandomResizedCrop(32),
        augment.RandAugment("rand-m7-mstd0.5-inc1"),
        augment.ColorJitter(0.1),
    ):
        op.draw(Address(0, 0, slots), sides, sides)
    batch.draw_mix(0, 0, 0, height=8, width=8, mixup_alpha=0.2, cutmix_alpha=1.0)
    batch.draw_mix(0, 0, 0, height=8, width=8, mixup_alpha=0.2, cutmix_alpha=0.0)
    batch.erase_boxes(0, 0, slots, 32, 32, 1.0, 0.02, 0.3, 0.3, 3.0)
    draws.torch_seed(0, 0, 0, draws.DROP)
    for kind in ("random", "quasi_random"):
        epoch_order(
            kind,
            0,
            0,
            files=np.zeros(4, np.uint16),
            pointers=np.arange(4, dtype=np.uint64),
            sizes=np.ones(4, np.uint64),
            window_bytes=1 << 30,
        )
    group_slots(0, 0, batch_size=2, groups=1)
    stops.lengthen_timeouts()

    replies = os.fdopen(os.dup(1), "w")
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            reply = os.waitstatus_to_exitcode(status)
        else:
            reply = os.fork()
            if reply == 0:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for descriptor, name in ((1, "out"), (2, "err")):
                    os.dup2(
                        os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor
                    )
                os.environ.update(request["env"])
                if request["largest_file"]:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
                stops.install()
                sys.argv = ["train_imagenet.py", *request["start"]]
                ended: Any = 1
                try:
                    exec(request["prepare"], {})
                    ended = exit_status(train_imagenet.main)
                except SystemExit as error:
                    ended = error.code
                except BaseException:
                    import traceback

                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                names = []
                for thread in os.listdir("/proc/self/task"):
                    # a thread may end meanwhile
                    with suppress(FileNotFoundError, ProcessLookupError):
                        names.append(Path(f"/proc/self/task/{thread}/comm").read_text())
                Path(f"{request['out']}.threads_{os.getpid()}").write_text("".join(names))
                os._exit(ended)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
