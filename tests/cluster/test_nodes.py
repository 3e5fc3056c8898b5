"""Jobs of torchrun on several nodes."""

import sys

import psutil

from tests.cluster.nodes import Network

LISTEN = """
import socket, sys
server = socket.create_server(("", 2000))
print("ready", flush=True)
peer, _ = server.accept()
while got := peer.recv(100):
    print(got.decode(), flush=True)
print("closed", flush=True)
"""
SEND = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 2000))
peer.send(b"hello ")
print("sent", flush=True)
time.sleep(1000)
"""


def test_nodes_have_their_own_name_address_processes_and_folders(make_nodes, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    one, two = make_nodes(2, private=[private], trap=True)
    assert one.run("hostname") == (0, "node1\n") and two.run("hostname") == (0, "node2\n")
    names = "import socket; print(*map(socket.gethostbyname, ('node1', 'node2')))"
    assert one.run(sys.executable, "-c", names) == (0, "127.0.1.1 10.77.0.2\n")
    assert two.run("sh", "-c", f"echo 2 > {private}/file; ls {private}") == (0, "file\n")
    assert one.run("ls", private) == (0, "") and not list(private.iterdir())
    assert (two.private(private) / "file").read_text() == "2\n"
    sleep = one.start("sleep", "1000")
    sleep.wait_until(lambda: [process.name() for process in one.processes()] == ["sleep"])
    assert not two.processes()


def test_cuts_of_a_node(make_nodes):
    one, two = make_nodes(2)

    def connect():
        listen = one.start(sys.executable, "-c", LISTEN)
        listen.wait_for_text("ready")
        send = two.start(sys.executable, "-c", SEND, one.address)
        listen.wait_for_text("hello")
        send.wait_for_text("sent")
        return listen

    listen = connect()
    two.freeze()
    assert {process.status() for process in two.processes()} == {"stopped"}
    two.thaw()
    assert "stopped" not in {process.status() for process in two.processes()}
    # without a network, the end of the process does not arrive
    two.kill()
    assert listen.poll() is None and "closed" not in listen.text()
    listen.kill()
    two.boot()
    listen = connect()
    two.link_down()
    two.link_up()
    two.kill(closes=True)
    listen.wait_for_text("closed")
    assert listen.wait() == 0


def test_nothing_is_left_of_the_nodes(make_nodes, tmp_path):
    network = Network(tmp_path, 2)
    started = [node.start("sleep", "1000") for node in network.nodes]
    started[0].wait_until(lambda: all(node.processes() for node in network.nodes))
    inside = [process for node in network.nodes for process in node.processes()]
    network.stop()
    assert all(command.wait() for command in started)
    assert not any(process.is_running() for process in inside)
    assert not [name for name in psutil.net_if_addrs() if "port" in name or name == "bridge"]
