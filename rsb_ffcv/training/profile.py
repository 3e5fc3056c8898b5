"""A trace of a few training steps, with the work of the loader's threads, for Chrome
(chrome://tracing) and Perfetto (ui.perfetto.dev).

torch's profiler records the Python thread and the GPU. The loader's threads do not run Python: the
core measures them itself, and their events are added to the same time line.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.loading import TrainLoader
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training.checkpoint import FIX

SKIPPED_STEPS = 10  # of the process, before the trace: compilation, first allocations
CLOCK = "rsb_ffcv: start of the trace"


class Profile:
    """Traces `steps` steps of a run, from step SKIPPED_STEPS of this process on. 0: none.

    loader: whose threads are measured.
    path: of the trace, JSON. It is written when the steps are done, or by `close`.
    console: for a line that names the file.
    """

    def __init__(self, steps: int, loader: TrainLoader, *, path: Path, console: Console) -> None:
        self._left, self._skip = steps, SKIPPED_STEPS
        self._loader, self._path, self._console = loader, path, console
        self._profiler: profile | None = None
        self._started_ns = 0

    def before_step(self) -> None:
        """Call before each step."""
        if self._left and self._profiler is None:
            if self._skip:
                self._skip -= 1
                return
            self._loader.events = []
            kinds = [ProfilerActivity.CPU]
            if self._loader.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=kinds)
            self._profiler.start()
            with record_function(CLOCK):
                self._started_ns = time.monotonic_ns()

    def after_step(self) -> None:
        """Call after each step."""
        if self._profiler is not None:
            self._left -= 1
            if not self._left:
                self.close()

    def close(self) -> None:
        """Writes the trace, if it has been started and not written."""
        profiler, events = self._profiler, self._loader.events
        if profiler is None or events is None:
            return
        self._profiler, self._loader.events, self._left = None, None, 0
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            trace = json.loads(Path(folder, "trace.json").read_text())
        clock = next(event for event in trace["traceEvents"] if event.get("name") == CLOCK)
        shift = clock["ts"] - self._started_ns / 1000
        for event in events:
            if event["ts"] * 1000 >= self._started_ns:
                trace["traceEvents"].append(
                    {**event, "ph": "X", "pid": os.getpid(), "ts": event["ts"] + shift}
                )
        with atomic_file(self._path, FIX) as file:
            file.write(json.dumps(trace).encode())
        self._console.info(
            f"{self._path}: a trace of the training steps; open it with chrome://tracing or "
            f"ui.perfetto.dev"
        )
