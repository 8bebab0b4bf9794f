"""What every socket of the mesh is set to, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """What every socket of the mesh is set to."""

    high_water_mark: int = 1024
    """Messages that wait to be sent to one peer."""
    receive_high_water_mark: int = 1 << 16
    """Messages of one peer that wait to be taken in; far more than any peer owes. libzmq 4.3.5 stops reading from a
    peer at the mark, and aborts the process if that connection then breaks (assertion `!_io_error`)."""
    linger_ms: int = 0
    max_message_bytes: int = 1 << 30
    heartbeat_interval_ms: int = 500
    heartbeat_timeout_ms: int = 3000
    """ZeroMQ's own ping on its I/O thread: the last resort, for connections that nobody else watches.

    Silence closes a connection after 3 to 3.5 s, on either side. Shorter, and a link that loses a third of its packets
    breaks every few seconds, although each message arrives after one or two resends; each such break costs a pipeline
    generation. Who is stopped or cut off is seen earlier: nodes by the router (`common/node/silence.py`), expert nodes
    by what they owe (`services/stage/experts/hedging.py`).
    """
    handshake_timeout_ms: int = 1000
    """A stopped process's kernel accepts connections; without this limit a new one would wait for it 30 s."""
    connect_timeout_ms: int = 1000
    """A cut network swallows the first packet; the kernel would send it again only after 1, 3, 7 s."""
    reconnect_interval_ms: int = 20
    reconnect_interval_max_ms: int = 60
    """A router that was restarted is waited for by every stream: nodes are to be back within a moment."""
    ipv6: bool = False
    """Whether host names are looked up as IPv6 as well, and first; addresses in brackets are IPv6 in any case."""
    socks_proxy: str = ""
    """HOST:PORT of a SOCKS5 proxy that every tcp connection is opened through; empty: none."""
