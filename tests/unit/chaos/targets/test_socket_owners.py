from __future__ import annotations

import os
import socket

from chaos.targets.local_target import inodes_of_port, owner_of_port

TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:D431 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 20 4 30 10 -1
   2: 0100007F:1F90 0100007F:D431 06 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
"""


def test_the_sockets_of_a_local_port_are_found_and_those_without_owner_are_not() -> None:
    assert inodes_of_port(TABLE, 0x1F90) == {4711}
    assert inodes_of_port(TABLE, 0xD431) == {4712}
    assert inodes_of_port(TABLE, 80) == set()


def test_a_listening_socket_is_named_by_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert owner_of_port(port, {"gone": 1 << 30, "this": os.getpid()}) == "this"
        assert owner_of_port(port, {"gone": 1 << 30}) == ""
