"""Which network interface the processes of a job use to reach each other.

gloo listens at the address that the machine's own name has. On Debian that is 127.0.1.1, where the
processes of other machines reach themselves; on other machines it may belong to a network that the
others do not have. In a job of several machines, gloo gets the interface through which a process
has just reached process 0, or another machine, unless GLOO_SOCKET_IFNAME names one. NCCL chooses by
itself: it prefers InfiniBand, and can use several interfaces.
"""

import ipaddress
import json
import os
import socket
from datetime import timedelta

import psutil
import torch.distributed as dist

from rsb_ffcv import InputError, warn
from rsb_ffcv.training import launch

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def interfaces() -> dict[str, list[str]]:
    """The addresses of each interface of this machine that is up and has any."""
    up = {name for name, about in psutil.net_if_stats().items() if about.isup}
    found = {
        name: [
            item.address.partition("%")[0]
            for item in items
            if item.family in (socket.AF_INET, socket.AF_INET6)
        ]
        for name, items in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def shown(found: dict[str, list[str]]) -> str:
    """Interfaces with their first addresses, as text for a message; without the loopback."""
    listed = [f"{name} ({addresses[0]})" for name, addresses in found.items() if name != "lo"]
    return ", ".join(listed) or "none but lo"


def wrong_choice(nccl: bool) -> str:
    """What is wrong with the interfaces that the user has chosen, as text for a message; empty if
    nothing is. nccl: whether the job uses NCCL."""
    found = interfaces()
    for variable in (GLOO, *([NCCL] if nccl else [])):
        value = os.environ.get(variable, "")
        missing = [name for name in value.split(",") if name and name not in found]
        if variable == NCCL:
            missing = _unmatched(value, list(found))
        if value and missing:
            return (
                f"{variable}={value}: {launch.host_name()} has no such interface "
                f"({', '.join(missing)}), it has {shown(found)}; set {variable} to one of them, or "
                f"unset it"
            )
    return ""


def _unmatched(value: str, names: list[str]) -> list[str]:
    """The parts of NCCL_SOCKET_IFNAME, if it selects no interface: they are prefixes, after "="
    names, after "^" prefixes of those that are not used."""
    parts = value.lstrip("^=").split(",")
    if value.startswith("="):
        chosen = [name for name in names if name in parts]
    else:
        matching = [name for name in names if name.startswith(tuple(parts))]
        chosen = [name for name in names if name not in matching] if value[:1] == "^" else matching
    return [] if chosen else parts


def own_address(address: str, port: int) -> tuple[str, bool]:
    """The address of this machine from which it sends to `address`, and whether that is another
    machine. Sends nothing. Raises OSError if it has no route to it."""
    family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        own = str(probe.getsockname()[0])
    return own, own != target[0] and not ipaddress.ip_address(own).is_loopback


def interface_of(address: str) -> str:
    """The name of the interface with this address; empty if there is none."""
    return next((name for name, own in interfaces().items() if address in own), "")


def choose(store: dist.Store, rank: int, world_size: int, *, nccl: bool, within: timedelta) -> None:
    """Sets GLOO_SOCKET_IFNAME in a job of several machines, if it is not set.

    store: of this job, in which all processes have met.
    nccl: whether the job uses NCCL.
    within: time limit for the answers of the others.

    Raises InputError, the same on all processes, if an interface that a user has chosen does not
    exist, and RuntimeError if a process does not answer.
    """
    try:
        own, remote = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except OSError:  # the store has been reached some other way
        own, remote = "127.0.0.1", False
    entry = {"own": own, "remote": remote, "wrong": wrong_choice(nccl)}
    store.set(f"network/{rank}", json.dumps(entry))
    if rank == 0:
        keys = [f"network/{other}" for other in range(world_size)]
        store.wait(keys, within)
        entries = [json.loads(text) for text in store.multi_get(keys)]
        wrong = next((entry["wrong"] for entry in entries if entry["wrong"]), "")
        peer = next((entry["own"] for entry in entries if entry["remote"]), "")
        store.set("network", json.dumps([wrong, peer]))
    store.wait(["network"], within)
    wrong, peer = json.loads(store.get("network"))
    if wrong:
        raise InputError(wrong)
    if not peer or os.environ.get(GLOO):
        return  # one machine, or the user's choice
    if ipaddress.ip_address(own).is_loopback:  # process 0's machine may be 127.0.1.1 to itself
        own, _ = own_address(peer, int(os.environ["MASTER_PORT"]))
    found = interface_of(own)
    if found:
        os.environ[GLOO] = found
    else:
        warn(
            f"{launch.host_name()}: no interface has the address {own}, from which this process "
            f"reaches the others; if they cannot connect, set {GLOO} to one of "
            f"{shown(interfaces())}"
        )
