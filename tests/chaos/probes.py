"""Whether bytes get from one node's network to another's, tried from inside both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from chaos.faults.network import NetworkNamespace
from chaos.target import Node

_LISTENING = "0A"
_LOOPBACK = ("0100007F", "0B00007F")
"""127.0.0.1, and the address of the engine's own name server in every container."""
_CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1.0).close()
except OSError as error:
    print(error)
else:
    print("reached")
"""
_RECEIVE_PACKETS = """
import socket, sys, time
taker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
taker.bind(("0.0.0.0", 0))
taker.settimeout(1.0)
print(taker.getsockname()[1], flush=True)
count = 0
try:
    while count < int(sys.argv[1]):
        taker.recv(100)
        count += 1
except TimeoutError:
    pass
print(count, flush=True)
"""
_SEND_PACKETS = """
import socket, sys, time
giver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(int(sys.argv[3])):
    try:
        giver.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
    except PermissionError:
        pass  # dropped by the sender's own filter
    time.sleep(0.001)
"""
_RECEIVE_BYTES = """
import socket, time
server = socket.create_server(("0.0.0.0", 0))
print(server.getsockname()[1], flush=True)
taker, _ = server.accept()
start, count = time.monotonic(), 0
while data := taker.recv(65536):
    count += len(data)
print(time.monotonic() - start, flush=True)
"""
_SEND_BYTES = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as giver:
    giver.sendall(bytes(int(sys.argv[3])))
"""


def reaches(node: Node, peer: Node) -> bool:
    """Whether a TCP connection from the node to a port that the peer listens on is made within a second."""
    try:
        table = Path(f"/proc/{peer.pid}/net/tcp").read_text()
    except OSError:
        return False  # it restarts
    rows = [line.split() for line in table.splitlines()[1:]]
    ports = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTENING and row[1][:8] not in _LOOPBACK}
    return bool(ports) and "reached" in _run_in(node, _CONNECT, address_of(peer), str(min(ports)))


def packets_arrived(giver: Node, taker: Node, count: int) -> int:
    """How many of so many UDP packets arrive."""
    with _start_in(taker, _RECEIVE_PACKETS, str(count)) as receiving:
        _run_in(giver, _SEND_PACKETS, address_of(taker), _line(receiving), str(count))
        return int(_line(receiving))


def seconds_to_send(giver: Node, taker: Node, count: int) -> float:
    """How long so many bytes take over TCP."""
    with _start_in(taker, _RECEIVE_BYTES) as receiving:
        _run_in(giver, _SEND_BYTES, address_of(taker), _line(receiving), str(count))
        return float(_line(receiving))


def address_of(node: Node) -> str:
    """Its address on the mesh's network, also while its link is down."""
    shown = NetworkNamespace(node.pid).run("ip", "-j", "-4", "address", "show", "dev", "eth0")
    return str(json.loads(shown)[0]["addr_info"][0]["local"])


def _words(node: Node, program: str, *arguments: str) -> list[str]:
    return ["nsenter", "-t", str(node.pid), "-n", sys.executable, "-S", "-c", program, *arguments]


def _run_in(node: Node, program: str, *arguments: str) -> str:
    command = _words(node, program, *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def _start_in(node: Node, program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(_words(node, program, *arguments), stdout=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
