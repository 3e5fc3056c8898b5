"""Runs a process on the cores next to its GPU: a copy from the memory of another NUMA node shares
the link between the processors with all others.

The topology is what Linux lists under /sys. In a container or on a machine with one node it may be
unknown; nothing changes then.
"""

import os
from pathlib import Path
from typing import Any

import torch

SYS = Path("/sys")


def read_list(text: str) -> set[int]:
    """The numbers of a list such as "0-3,8,10-11", as the kernel writes it."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def cores_of_device(bus_id: str, root: Path = SYS) -> tuple[int, set[int]] | None:
    """The NUMA node of a PCI device, and the node's cores; None if they are unknown.

    bus_id: for example "0000:3b:00.0".
    root: where sysfs is mounted.
    """
    try:
        node = int((root / "bus/pci/devices" / bus_id / "numa_node").read_text())
        if node < 0:
            return None
        return node, read_list((root / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):
        return None


def bus_id_of(device: torch.device) -> str:
    """The PCI address of a CUDA device, as sysfs writes it."""
    about: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the fields
    return f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"


def move_to_device(bus_id: str, root: Path = SYS) -> str:
    """Restricts this process to those of its cores that are on the NUMA node of the device. Threads
    that it starts later inherit that, and memory that it allocates later is on that node.

    Returns a line for the console; empty if nothing has changed: the node is unknown, has all cores
    of the process, or none of them.
    """
    found = cores_of_device(bus_id, root)
    before = os.sched_getaffinity(0)
    if found is None or not before & found[1] or before <= found[1]:
        return ""
    node, cores = found
    os.sched_setaffinity(0, before & cores)
    return (
        f"{len(before & cores)} of {len(before)} cores: those of NUMA node {node}, as GPU {bus_id}"
    )
