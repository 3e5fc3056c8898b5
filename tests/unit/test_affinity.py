"""A process moves to the cores of its GPU's NUMA node, on made-up topologies."""

import os
from types import SimpleNamespace

import pytest
import torch

from rsb_ffcv.training import affinity

BUS = "0000:3b:00.0"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(own=..., nodes={node: list}, node=...): a sysfs, and the cores that the process has.
    Returns the sets that the process was restricted to."""

    def make(own, nodes, node):
        device = tmp_path / "bus/pci/devices" / BUS
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
        for number, cores in nodes.items():
            folder = tmp_path / f"devices/system/node/node{number}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(cores + "\n")
        restricted: list[set[int]] = []
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: own)
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: restricted.append(cores))
        return restricted

    return make


def test_lists_of_cores_are_read_as_the_kernel_writes_them():
    assert affinity.read_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert affinity.read_list("5") == {5} and affinity.read_list("\n") == set()


def test_process_moves_to_the_node_of_its_gpu(machine, tmp_path):
    restricted = machine(set(range(16)), {0: "0-3,8-11", 1: "4-7,12-15"}, node=1)
    line = affinity.move_to_device(BUS, tmp_path)
    assert restricted == [{4, 5, 6, 7, 12, 13, 14, 15}]
    assert line == f"8 of 16 cores: those of NUMA node 1, as GPU {BUS}"


def test_restriction_of_the_user_is_kept(machine, tmp_path):
    restricted = machine({2, 3, 4, 5}, {0: "0-3", 1: "4-7"}, node=1)
    assert affinity.move_to_device(BUS, tmp_path) and restricted == [{4, 5}]


@pytest.mark.parametrize(
    "own, node",
    [
        (set(range(8)), -1),  # one node, or hidden by a virtual machine
        (set(range(8)), 9),  # a node that is not listed
        ({0, 1}, 1),  # none of the process's cores
        ({4, 5}, 1),  # all of them
    ],
)
def test_nothing_changes_otherwise(machine, tmp_path, own, node):
    restricted = machine(own, {0: "0-3", 1: "4-7"}, node=node)
    assert affinity.move_to_device(BUS, tmp_path) == "" and not restricted


def test_unknown_device_changes_nothing(tmp_path):
    assert affinity.move_to_device("0000:ff:00.0", tmp_path) == ""


def test_bus_id_has_the_form_of_sysfs(monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0),
    )
    assert affinity.bus_id_of(torch.device("cuda", 0)) == BUS
