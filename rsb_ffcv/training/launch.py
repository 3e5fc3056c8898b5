"""The place of this process in its job: which process of how many, and where the first one listens.

The launcher's environment variables go in; torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) come out, for every launcher. Everything that
asks for them, torch included, then finds the same values.

Does not import torch, whose import takes seconds.
"""

import os
import re
import socket
from typing import NamedTuple

from rsb_ffcv import InputError, counted

# Ports that a step of SLURM may get: below those that Linux gives to outgoing connections
FIRST_PORT, PORTS = 20000, 10000
STEPS_PER_JOB = 16  # consecutive jobs have different ports up to this number of steps


class Place(NamedTuple):
    """rank of world_size in the job, local_rank of local_world_size on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place_in_job() -> Place:
    """The place of this process; (0, 1, 0, 1) if it was started alone.

    Raises InputError if the launcher's variables are invalid, incomplete, or contradict each other.
    """
    read_slurm()
    found = {}
    for name, default in (
        ("RANK", 0),
        ("WORLD_SIZE", 1),
        ("LOCAL_RANK", 0),
        ("LOCAL_WORLD_SIZE", 1),
    ):
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise InputError(
                f"{name}={text}: must be an integer, 0 or more; start the job with torchrun, or "
                f"unset it"
            )
        found[name] = int(text)
    place = Place(*found.values())
    if place.rank >= place.world_size or not 0 < place.local_world_size <= place.world_size:
        raise InputError(
            f"RANK={place.rank} and LOCAL_WORLD_SIZE={place.local_world_size} do not fit "
            f"WORLD_SIZE={place.world_size}; start the job with torchrun, or unset them"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if place.world_size > 1 and missing:
        raise InputError(
            f"WORLD_SIZE={place.world_size} is set, but {' and '.join(missing)} "
            f"{'are' if missing[1:] else 'is'} not; start the job with torchrun, or set them"
        )
    return place


def slurm_tasks() -> int:
    """The number of processes that srun has started together with this one; 0 without srun.

    Only a step, which srun creates, has SLURM_STEP_NUM_TASKS. SLURM_NTASKS and SLURM_PROCID are
    also set in a job script, where one process runs.
    """
    if "SLURM_STEP_ID" not in os.environ:
        return 0
    return _number("SLURM_STEP_NUM_TASKS")


def read_slurm() -> None:
    """In a step of several tasks, sets torchrun's variables from SLURM's. Variables that are set
    must agree with SLURM's; MASTER_ADDR and MASTER_PORT may be chosen freely.

    Does nothing if RANK and WORLD_SIZE are set: then torchrun, training.distributed=1 or the user
    has numbered the processes.

    Raises InputError if variables contradict each other.
    """
    tasks = slurm_tasks()
    if tasks < 2 or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    node, counts = _number("SLURM_NODEID"), os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    on_nodes, names = task_counts(counts), step_nodes()
    if sum(on_nodes) != tasks or len(on_nodes) != len(names) or node >= len(names):
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE={counts} and SLURM_NODEID={node} do not fit "
            f"SLURM_STEP_NUM_TASKS={tasks} and "
            f"SLURM_STEP_NODELIST={os.environ.get('SLURM_STEP_NODELIST', '')}; start the processes "
            f"with srun"
        )
    job = node_names(os.environ.get("SLURM_JOB_NODELIST", ""))
    if not set(names) <= set(job):  # sbatch in a step hands the step's variables to the new job
        raise InputError(
            f"SLURM_STEP_NODELIST={os.environ['SLURM_STEP_NODELIST']} is no part of "
            f"SLURM_JOB_NODELIST={os.environ.get('SLURM_JOB_NODELIST', '')}: the job was submitted "
            f"inside another one's step; start the processes with srun, or unset SLURM_STEP_ID"
        )
    for name, source, number in (
        ("RANK", "SLURM_PROCID", _number("SLURM_PROCID")),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", tasks),
        ("LOCAL_RANK", "SLURM_LOCALID", _number("SLURM_LOCALID")),
        ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", on_nodes[node]),
    ):
        text = os.environ.setdefault(name, str(number))
        if text != str(number):
            raise InputError(
                f"{name}={text}, but {source} says {number}; unset {name}: srun numbers the "
                f"processes"
            )
    port = FIRST_PORT + (
        (_number("SLURM_JOB_ID") * STEPS_PER_JOB + _number("SLURM_STEP_ID")) % PORTS
    )
    os.environ.setdefault("MASTER_ADDR", names[0])
    os.environ.setdefault("MASTER_PORT", str(port))


def check_address(rank: int) -> None:
    """Raises InputError, which names the variable, if this process cannot use MASTER_ADDR and
    MASTER_PORT: to listen there as process 0, or to connect to it."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"MASTER_PORT={port}: must be an integer from 1 to 65535; set a free port")
    try:
        found = socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(
            f"MASTER_ADDR={address}: {host_name()} does not know this name ({error.strerror}); set "
            f"MASTER_ADDR to an address of the machine of process 0"
        ) from error
    if rank:
        return
    # Without SLURM, the address may be that of a proxy.
    if slurm_tasks() > 1 and not any(_is_local(str(where[0])) for *_, where in found):
        raise InputError(
            f"MASTER_ADDR={address}: {host_name()}, where process 0 runs, has no such address; set "
            f"MASTER_ADDR={host_name()}"
        )
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise InputError(
            f"MASTER_PORT={port}: process 0 cannot listen on it on {host_name()} "
            f"({os.strerror(error.errno or 0)}); set MASTER_PORT to a free port"
        ) from error


def _is_local(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError:
        return False
    return True


def has_parent() -> bool:
    """Whether a launcher may forward a signal that this process has already received: torchrun,
    training.distributed=1, or SLURM, which sends SIGTERM twice when it preempts a job."""
    return "WORLD_SIZE" in os.environ or "SLURM_JOB_ID" in os.environ


def host_name() -> str:
    """The name of this machine: SLURM's, if it started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def absent(hosts: dict[int, str], world_size: int) -> str:
    """Which of `world_size` processes are missing, as text for a message.

    hosts: the machine of each process that has connected.
    """
    missing = [rank for rank in range(world_size) if rank not in hosts]
    if not missing:
        return f"all {world_size} processes have connected, but one of them has ended,"
    nodes = sorted(set(step_nodes()) - set(hosts.values())) if slurm_tasks() > 1 else []
    shown = ", ".join(map(str, missing[:16])) + ", ..." * (len(missing) > 16)
    return (
        f"{len(hosts)} of {counted(world_size, 'process', 'processes')} have connected; missing: "
        f"{shown}" + (f" (none has from {', '.join(nodes)})" if nodes else "")
    )


def step_nodes() -> list[str]:
    """The names of the nodes of SLURM's step, in the order of their SLURM_NODEID."""
    return node_names(os.environ.get("SLURM_STEP_NODELIST", ""))


def node_names(text: str) -> list[str]:
    """The names in a list of SLURM: "gpu[01-03,7],login" -> gpu01, gpu02, gpu03, gpu7, login."""
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^]]*\])+", text):
        found = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^]]*)\]", item):
            ends = (
                [plain] if plain else [name for part in ranges.split(",") for name in _range(part)]
            )
            found = [start + end for start in found for end in ends]
        names += found
    return names


def _range(text: str) -> list[str]:
    """The numbers of "08-11", or of "7", with the zeros in front of the first."""
    first, _, last = text.partition("-")
    try:
        return [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    except ValueError as error:
        raise InputError(f"[{text}] in SLURM's list of nodes is not a range of numbers") from error


def task_counts(text: str) -> list[int]:
    """The tasks of each node in SLURM's notation: "2(x3),1" -> 2, 2, 2, 1."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise InputError(
            f"{name}={text}: SLURM sets it to an integer; start the processes with srun"
        )
    return int(text)
