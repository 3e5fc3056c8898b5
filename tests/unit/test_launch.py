"""The place of a process in its job, from the variables of torchrun and SLURM."""

import os
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from rsb_ffcv import InputError
from rsb_ffcv.training import join, launch, network

# process 5 of `srun --nodes=3 --ntasks=6` in a job of four nodes
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "gpu[01-03,7]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[02-03,7]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),2",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "gpu7",
}
# what a job script, and the shell of salloc, have
SCRIPT = {name: STEP[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}
ALONE = launch.Place(0, 1, 0, 1)


@pytest.fixture
def environment(monkeypatch):
    """environment(variables): has these variables, and no others of a launcher, until the end."""

    def become(variables):
        kept = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("SLURM", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_"))
        }
        monkeypatch.setattr(os, "environ", {**kept, **variables})

    return become


@pytest.mark.parametrize(
    "text, names",
    [
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("node[1-3,07]-x", ["node1-x", "node2-x", "node3-x", "node07-x"]),
        ("rack[1-2]n[098-100]", [f"rack{r}n{n}" for r in (1, 2) for n in ("098", "099", "100")]),
        ("node3,node1", ["node3", "node1"]),
        ("localhost", ["localhost"]),
        ("", []),
    ],
)
def test_lists_of_nodes_are_expanded_in_order(text, names):
    assert launch.node_names(text) == names


def test_counts_of_tasks_are_expanded():
    assert launch.task_counts("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]
    assert launch.task_counts("16") == [16]


def test_tasks_of_srun_are_the_processes_of_a_job(environment):
    environment(STEP)
    assert launch.place_in_job() == (5, 6, 1, 2)
    assert os.environ["MASTER_ADDR"] == "gpu02" and launch.host_name() == "gpu7"
    port = int(os.environ["MASTER_PORT"])
    assert 20000 <= port < 30000 and launch.has_parent()
    assert launch.place_in_job() == (5, 6, 1, 2)  # also when it is asked again
    environment({**STEP, "SLURM_STEP_ID": "4"})
    launch.read_slurm()
    assert int(os.environ["MASTER_PORT"]) != port
    environment({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "WORLD_SIZE": "6"})
    launch.read_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    "variables", [{}, SCRIPT, {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}]
)
def test_one_process_in_a_job_script_or_a_step_of_one_task_is_alone(environment, variables):
    environment(variables)
    assert launch.place_in_job() == ALONE and "MASTER_ADDR" not in os.environ
    # SLURM sends SIGTERM twice, with every launcher
    assert launch.has_parent() == ("SLURM_JOB_ID" in variables)


def test_variables_of_torchrun_come_before_those_of_slurm(environment):
    torchrun = {"RANK": "9", "WORLD_SIZE": "48", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    environment({**STEP, **torchrun, "MASTER_ADDR": "gpu7", "MASTER_PORT": "1234"})
    assert launch.place_in_job() == (9, 48, 1, 8) and os.environ["MASTER_ADDR"] == "gpu7"


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but SLURM_STEP_NUM_TASKS says 6; unset WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0, but SLURM_PROCID says 5; unset RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but SLURM_LOCALID says 1"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x: SLURM sets it to an integer"),
        ({"SLURM_STEP_NUM_TASKS": "7"}, "do not fit SLURM_STEP_NUM_TASKS=7"),
        ({"SLURM_STEP_NODELIST": "gpu[02-03"}, "do not fit .*SLURM_STEP_NODELIST=gpu\\[02-03;"),
        ({"SLURM_STEP_NODELIST": "gpu[a-b,2,3]"}, "\\[a-b\\] in SLURM's list of nodes is not a"),
        (
            {"SLURM_JOB_NODELIST": "gpu9"},
            "SLURM_STEP_NODELIST=.* is no part of SLURM_JOB_NODELIST=gpu9: the job was submitted "
            "inside another one's step",
        ),
    ],
)
def test_contradictory_variables_are_one_line(environment, variables, message):
    environment({**STEP, **variables})
    with pytest.raises(InputError, match=message) as found:
        launch.place_in_job()
    assert "\n" not in str(found.value)


def test_a_step_of_several_tasks_does_not_start_more_processes(
    environment, betons, tmp_path, call_program
):
    from tests.integration.runs import options

    environment(STEP)
    more = {"training.distributed": 1, "dist.world_size": 2}
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run", **more))
    assert status == 2 and not (tmp_path / "run").exists()
    assert "training.distributed=1: srun has started 6 processes (SLURM_STEP_NUM_TASKS)" in err


def test_address_that_process_0_cannot_use_is_one_line(environment, free_port):
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port)}

    def refusal(variables, rank=0):
        environment({**STEP, **place, **variables})
        with pytest.raises(InputError) as found:
            launch.check_address(rank)
        assert "\n" not in str(found.value)
        return str(found.value)

    environment({**STEP, **place})
    launch.check_address(0)
    with socket.create_server(("", free_port)):
        assert refusal({}).startswith(
            f"MASTER_PORT={free_port}: process 0 cannot listen on it on gpu7 (Address already in "
            f"use); set MASTER_PORT to a free port"
        )
        launch.check_address(1)  # it connects to that port
    assert "MASTER_PORT=x: must be an integer" in refusal({"MASTER_PORT": "x"})
    # TEST-NET-1 of RFC 5737: no machine has this address
    assert refusal({"MASTER_ADDR": "192.0.2.1"}).startswith(
        "MASTER_ADDR=192.0.2.1: gpu7, where process 0 runs, has no such address; set MASTER_ADDR="
    )
    assert "MASTER_ADDR=no.such.host.invalid: gpu7 does not know this name (" in refusal(
        {"MASTER_ADDR": "no.such.host.invalid"}, rank=1
    )


def meet(store, rank: int, world_size: int):
    return join._private_store(
        store, rank, world_size, fresh=True, address="gpu02:1234", timeout_s=60
    )


def test_missing_processes_and_their_nodes_are_named(environment, monkeypatch):
    environment(STEP)
    monkeypatch.setattr(join, "RENDEZVOUS_SECONDS", 0)
    store = dist.HashStore()
    for rank, host in ((0, "gpu02"), (1, "gpu02"), (3, "gpu02")):
        store.set(f"name/{rank}", f"id{rank} 6 {host}")
    message = (
        "4 of 6 processes have connected; missing: 2, 4 (none has from gpu03) at gpu02:1234 after "
        "0 s; see whether they have started, and the error message of one that ended"
    )
    with pytest.raises(InputError) as found:
        meet(store, 5, 6)
    assert str(found.value) == message
    assert store.get("failed").decode() == message


def test_missing_processes_are_named_without_slurm(environment):
    environment({})
    assert launch.absent({0: "a", 2: "b"}, 4).endswith(" processes have connected; missing: 1, 3")
    assert "missing: 1, 2, 3," in (long := launch.absent({0: "a"}, 100)) and long.endswith(
        "16, ..."
    )
    assert launch.absent({0: "a", 1: "a"}, 2).startswith("all 2 processes have connected, but one")


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_is_lost_while_they_compare_their_interfaces(environment, rank):
    environment({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"})
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=600))  # of all that precedes
    with pytest.raises(RuntimeError, match="[Tt]imeout"):
        network.choose(store, rank, 2, nccl=False, within=timedelta(seconds=0.2))


def test_processes_with_another_world_size_or_the_same_rank_are_rejected(environment):
    environment(STEP)
    store = dist.HashStore()
    store.set("name/0", "id0 2 gpu02")
    with pytest.raises(
        InputError, match="WORLD_SIZE=2 on process 0 \\(gpu02\\), but 6 on process 5 \\(gpu7\\)"
    ):
        meet(store, 5, 6)
    assert store.check(["failed"])
    with pytest.raises(
        InputError, match="two processes have RANK=0 \\(on gpu02 and gpu7\\); number the 2 "
    ):
        meet(store, 0, 2)
