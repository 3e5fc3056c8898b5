"""How long two processes take until both have a checkpoint of a ResNet-50: each from its own
folder, or the second one over the network (here: the loopback).

    torchrun --nproc_per_node=2 records/2026-11-26_folders/measure.py FOLDER"""

import shutil
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist

from rsb_ffcv.training import checkpoint, compute, copies

REPEATS = 7
where = compute.set_up("cpu", "fp32", compile="0", channels_last=False, threads=1)
folders = [Path(sys.argv[1]) / str(rank) for rank in range(2)]
own, name = folders[where.rank], checkpoint.NAME.format(1)
own.mkdir(parents=True, exist_ok=True)
if where.rank == 0:
    torch.manual_seed(0)
    model = timm.create_model("resnet50").state_dict()
    moments = {key: {"exp_avg": value, "exp_avg_sq": value} for key, value in model.items()}
    state = {**dict.fromkeys(checkpoint.KEYS), "model": model, "optimizer": moments, "ema": model}
    checkpoint.write(checkpoint.on_host(state), own / name)
    shutil.copy(own / name, folders[1] / name)
dist.barrier()
size = (folders[0] / name).stat().st_size
seconds: dict[str, list[float]] = {"read": [], "sent": []}
for _ in range(REPEATS):
    for way, folder in (("read", own), ("sent", folders[0] if where.rank == 0 else own / "none")):
        dist.barrier()
        began = time.perf_counter()
        mine = checkpoint.read(own / name) if where.rank == 0 else None
        copies.everywhere(0, folders[0] / name, folder / name, own=mine)
        dist.barrier()
        seconds[way].append(time.perf_counter() - began)
if where.rank == 0:
    for way, values in seconds.items():
        print(
            f"{way}: {size / 1e6:.0f} MB, median {statistics.median(values):.2f} s, "
            f"{min(values):.2f} to {max(values):.2f} s"
        )
compute.destroy_process_group()
