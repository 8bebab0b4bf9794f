"""Typed sockets: call sites put and get messages and see no bytes.

Every socket states its high-water mark, linger, largest message and heartbeat. Sends never block: a socket whose
high-water mark is reached raises `Full`, and credits further up keep that from happening in a healthy mesh. One socket
per (peer, incarnation, generation) with IMMEDIATE=1, since a PUSH or DEALER with several peers deals its messages round
and loses what was queued for a dead one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path

import structlog
import zmq
from zmq.utils.monitor import recv_monitor_message

from common.errors import ConfigurationError, MeshError, ProtocolError, SocketError
from common.messages import Header, Message
from common.wire.codec import decode, encode
from common.wire.socket_files import DiskCanary, SocketFile
from common.wire.tcp_resends import resend_soon

log = structlog.get_logger(__name__)

MAX_PING_BYTES = 64
"""What an echo takes."""

COPIED_BYTES = 1 << 18
"""A frame of up to so many bytes is copied when it is sent: pyzmq has a thread that lets go of what was not, which has
to be woken up and takes the interpreter."""

DISK_WITHIN_S = 0.05
"""How long a loop waits for the disk of its socket files, once: one that hangs is asked again when it has answered."""


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
    """ZeroMQ's own ping on its I/O thread: the last resort, for connections that nothing else watches.

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
    """Every stream waits for a router that was restarted: nodes are to be back within a moment."""
    ipv6: bool = False
    """Whether host names are looked up as IPv6 as well, and first; addresses in brackets are IPv6 in any case."""
    socks_proxy: str = ""
    """HOST:PORT of a SOCKS5 proxy that every tcp connection is opened through; empty: none."""


class Full(MeshError):
    """A peer does not take what is sent: its queue of `high_water_mark` messages is full, or it is not connected."""

    code = "peer_full"


_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def _no_socket(name: str, error: zmq.ZMQError) -> SocketError:
    return SocketError(
        f"{name}: no socket can be opened ({error.strerror}); `ulimit -Hn`, or the container's `nofile`, says how many "
        "files and sockets this process may have open"
    )


class LinkEvent(Enum):
    """What a socket's monitor tells of its connection."""

    CONNECTED = "connected"
    CLOSED = "closed"
    REFUSED = "refused"
    """Closed, and nothing listens there any more: what listened has ended, or has closed its sockets."""


class Transport:
    """Makes sockets over one ZeroMQ context. Every method that makes one raises SocketError where the process may not
    have one more."""

    def __init__(self, limits: SocketLimits) -> None:
        self.context = zmq.Context(io_threads=1)
        # libzmq's own limit is 1,023, whatever the system allows; a router has three for each node.
        self.context.set(zmq.MAX_SOCKETS, self.context.get(zmq.SOCKET_LIMIT))
        self.limits = limits
        self.num_changes = 0
        """Sockets opened and closed so far: when it has changed, a loop that waits for them looks which there are."""
        self._monitor_numbers = itertools.count()
        self._files: list[SocketFile] = []
        self._canary = DiskCanary(lambda: [os.path.lexists(file.path) for file in self._files])
        self._echo: Echo | None = None

    def pull(self, name: str, endpoints: Sequence[str]) -> MessageSocket:
        """Opens a bound PULL: steps from the process upstream."""
        raw = self._raw(zmq.PULL, name, endpoints)
        return MessageSocket(self, name, raw, self._bind(name, raw, endpoints))

    def push(self, name: str, endpoint: str, *, is_watched: bool = False) -> MessageSocket:
        """Opens a connected PUSH to one peer. One that `is_watched` is asked for its `link_events` in each turn."""
        return self._connected(zmq.PUSH, name, endpoint, is_watched=is_watched)

    def dealer(
        self, name: str, endpoint: str, identity: bytes = b"", limits: SocketLimits | None = None
    ) -> MessageSocket:
        """Opens a connected DEALER to one peer's ROUTER. `limits`: None: those of all."""
        return self._connected(zmq.DEALER, name, endpoint, identity, limits=limits)

    def router(self, name: str, endpoints: Sequence[str], limits: SocketLimits | None = None) -> RoutingSocket:
        """Opens a bound ROUTER: answers go to the identity that asked; an unknown one raises instead of dropping.
        `limits`: None: those of all."""
        raw = self._raw(zmq.ROUTER, name, endpoints, limits)
        raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
        raw.setsockopt(zmq.ROUTER_HANDOVER, 1)
        return RoutingSocket(self, name, raw, self._bind(name, raw, endpoints))

    def look_after_files(self, now_s: float, *, at_once: bool = False) -> bool:
        """Make the files of bound sockets again that are gone; to be called in each turn of the owner's loop.

        True if one had to be made again. Connections that stand are not touched. A disk that hangs is left alone.
        """
        if self._echo is not None:
            self._echo.socket.link_events()
        if not any(at_once or file.is_due(now_s) for file in self._files) or not self._canary.lives(DISK_WITHIN_S):
            return False
        # All of them are looked at: a generator would end with the first that was gone.
        return any([file.look(now_s, at_once=at_once) for file in self._files])

    def tell_damaged(self, name: str, error: ProtocolError) -> None:
        """Logs that what came to a socket is not a message."""
        log.error("damaged_message", socket=name, reason=str(error))

    def echo(self, endpoint: str, identity: bytes) -> None:
        """Answer whatever a peer's ROUTER sends with itself, on threads of its own, until `close` or another call.

        The same endpoint again changes nothing. Raises ConfigurationError, and SocketError where there is no thread.
        """
        if self._echo is not None and self._echo.endpoint == endpoint:
            return
        self._end_echo()
        other = Transport(replace(self.limits, max_message_bytes=MAX_PING_BYTES))
        socket = other._connected(zmq.DEALER, "echo", endpoint, identity)
        try:
            self._echo = Echo(other.context, socket, endpoint)
        except RuntimeError as error:
            other.context.destroy(linger=0)
            raise SocketError(f"echo: {error}; a limit of threads or processes (`ulimit -u`) is reached") from None

    def _end_echo(self) -> None:
        if self._echo is not None:
            self._echo.close()
            self._echo = None

    def close(self) -> None:
        """Close what is left and free the I/O threads; ZeroMQ leaves the files of its sockets."""
        self._end_echo()
        self.context.destroy(linger=0)
        for file in self._files:
            with contextlib.suppress(OSError):  # in a folder that is read-only by now it stays: nothing listens there
                file.remove()
        self._files.clear()

    def _connected(
        self,
        kind: int,
        name: str,
        endpoint: str,
        identity: bytes = b"",
        *,
        is_watched: bool = True,
        limits: SocketLimits | None = None,
    ) -> MessageSocket:
        raw = self._raw(kind, name, [endpoint], limits)
        raw.setsockopt(zmq.IMMEDIATE, 1)
        if identity:
            raw.setsockopt(zmq.IDENTITY, identity)
        try:
            monitor = raw.get_monitor_socket(
                zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED,
                f"inproc://monitor-{next(self._monitor_numbers)}",
            )
        except zmq.ZMQError as error:
            raw.close(linger=0)
            raise _no_socket(name, error) from None
        try:
            raw.connect(endpoint)
        except zmq.ZMQError as error:
            raw.disable_monitor()
            monitor.close(linger=0)
            raw.close(linger=0)
            raise ConfigurationError(f"{name}: {endpoint!r} is not an address to connect to: {error}") from None
        return MessageSocket(self, name, raw, (endpoint,), monitor, is_watched=is_watched)

    def _raw(
        self, kind: int, name: str, endpoints: Sequence[str], limits: SocketLimits | None = None
    ) -> zmq.Socket[bytes]:
        try:
            raw = self.context.socket(kind)
        except zmq.ZMQError as error:
            raise _no_socket(name, error) from None
        limits = limits or self.limits
        raw.setsockopt(zmq.IPV6, int(limits.ipv6 or any(endpoint.startswith("tcp://[") for endpoint in endpoints)))
        raw.setsockopt(zmq.SNDHWM, limits.high_water_mark)
        raw.setsockopt(zmq.RCVHWM, limits.receive_high_water_mark)
        raw.setsockopt(zmq.LINGER, limits.linger_ms)
        raw.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes)
        raw.setsockopt(zmq.HEARTBEAT_IVL, limits.heartbeat_interval_ms)
        raw.setsockopt(zmq.HEARTBEAT_TIMEOUT, limits.heartbeat_timeout_ms)
        raw.setsockopt(zmq.HEARTBEAT_TTL, limits.heartbeat_timeout_ms)
        raw.setsockopt(zmq.HANDSHAKE_IVL, limits.handshake_timeout_ms)
        raw.setsockopt(zmq.CONNECT_TIMEOUT, limits.connect_timeout_ms)
        raw.setsockopt(zmq.RECONNECT_IVL, limits.reconnect_interval_ms)
        raw.setsockopt(zmq.RECONNECT_IVL_MAX, limits.reconnect_interval_max_ms)
        if limits.socks_proxy:
            raw.setsockopt_string(zmq.SOCKS_PROXY, limits.socks_proxy)
        return raw

    def _bind(self, name: str, raw: zmq.Socket[bytes], endpoints: Sequence[str]) -> tuple[str, ...]:
        """Binds to all; a port of `*` becomes the one that was given. Raises ConfigurationError with the address."""
        bound = []
        for endpoint in endpoints:
            try:
                self._listen(raw, endpoint)
            except zmq.ZMQError as error:
                raw.close(linger=0)
                if error.errno in _TOO_MANY:
                    raise _no_socket(name, error) from None
                raise ConfigurationError(f"{endpoint!r} cannot be listened on: {error}") from None
            bound.append(raw.getsockopt_string(zmq.LAST_ENDPOINT))
            if endpoint.startswith("ipc:///"):
                # A second time, beside the first: to unbind that one would close the connections that it has accepted.
                self._files.append(
                    SocketFile(name, Path(endpoint.removeprefix("ipc://")), partial(_bind_again, raw, endpoint))
                )
        return tuple(bound)

    def _listen(self, raw: zmq.Socket[bytes], endpoint: str) -> None:
        """Binds, and sets what listens to send again soon what is lost: so does each connection that it accepts, unless
        there is no socket left to learn the descriptor by. Raises zmq.ZMQError."""
        if not endpoint.startswith("tcp://"):
            raw.bind(endpoint)
            return
        try:
            monitor = raw.get_monitor_socket(zmq.EVENT_LISTENING, f"inproc://monitor-{next(self._monitor_numbers)}")
        except zmq.ZMQError:
            raw.disable_monitor()
            raw.bind(endpoint)
            return
        try:
            raw.bind(endpoint)
            while monitor.poll(0):
                resend_soon(recv_monitor_message(monitor)["value"])
        finally:
            raw.disable_monitor()
            monitor.close(linger=0)


class MessageSocket:
    """A socket whose messages need no address: PUSH, PULL or DEALER."""

    def __init__(
        self,
        transport: Transport,
        name: str,
        raw: zmq.Socket[bytes],
        endpoints: tuple[str, ...],
        monitor: zmq.Socket[bytes] | None = None,
        *,
        is_watched: bool = True,
    ) -> None:
        self.name = name
        self.endpoints = endpoints
        self.raw = raw
        self.monitor = monitor
        self._is_watched = is_watched
        self.bytes_sent = 0
        self._transport = transport
        self._sequence_number = 0
        transport.num_changes += 1

    def send(self, message: Message, header: Header) -> None:
        """Queue a message. Raises Full instead of blocking; the caller still has the message then."""
        if not self._is_watched:
            self.link_events()
        frames = encode(message, header, self._sequence_number + 1)
        try:
            _send(self.raw, frames)
        except zmq.Again:
            raise Full(f"{self.name}: the peer does not take messages") from None
        self._sequence_number += 1
        self.bytes_sent += _size(frames)

    def receive(self) -> tuple[Message, Header] | None:
        """Returns the next message, or None when nothing waits. Damaged ones are reported to the transport and
        skipped."""
        while (frames := _receive(self.raw)) is not None:
            try:
                return decode(frames)
            except ProtocolError as error:
                self._transport.tell_damaged(self.name, error)
        return None

    def link_events(self) -> list[LinkEvent]:
        """Returns what the monitor saw since the last call; only for sockets that connect. A connection that it tells
        of is set to send again soon what is lost."""
        events: list[LinkEvent] = []
        while self.monitor is not None and _has_message(self.monitor):
            told = recv_monitor_message(self.monitor)
            if told["event"] == zmq.EVENT_CONNECTED:
                resend_soon(told["value"])
            else:
                events.append(LinkEvent.CLOSED if told["event"] == zmq.EVENT_DISCONNECTED else LinkEvent.CONNECTED)
        return events

    def close(self) -> None:
        """Drop what is queued and close."""
        if self.monitor is not None:
            self.raw.disable_monitor()
            self.monitor.close(linger=0)
            self.monitor = None
        self.raw.close(linger=0)
        self._transport.num_changes += 1


class RoutingSocket:
    """A bound ROUTER: messages come with the identity of the peer, and go to one."""

    def __init__(self, transport: Transport, name: str, raw: zmq.Socket[bytes], endpoints: tuple[str, ...]) -> None:
        self.name = name
        self.endpoints = endpoints
        self.raw = raw
        self.bytes_sent = 0
        self._transport = transport
        transport.num_changes += 1

    def send(self, identity: bytes, message: Message, header: Header) -> None:
        """Queue a message for a peer. Raises Full if the peer is gone or does not take messages."""
        frames = encode(message, header)
        try:
            _send(self.raw, [identity, *frames])
        except (zmq.Again, zmq.ZMQError) as error:
            if isinstance(error, zmq.Again) or error.errno == zmq.EHOSTUNREACH:
                raise Full(f"{self.name}: peer {identity!r} is gone or does not take messages") from None
            raise
        self.bytes_sent += _size(frames)

    def receive(self) -> tuple[bytes, Message, Header] | None:
        """Returns the next message with its sender's identity, or None. Damaged ones are reported and skipped."""
        while (frames := _receive(self.raw)) is not None:
            try:
                message, header = decode(frames[1:])
            except ProtocolError as error:
                self._transport.tell_damaged(self.name, error)
                continue
            return bytes(frames[0]), message, header
        return None

    def close(self) -> None:
        """Drop what is queued and close."""
        self.raw.close(linger=0)
        self._transport.num_changes += 1


def _bind_again(raw: zmq.Socket[bytes], endpoint: str) -> None:
    if raw.closed:
        raise OSError("the socket is closed")
    try:
        raw.bind(endpoint)
    except zmq.ZMQError as error:
        raise OSError(str(error)) from None


def _has_message(raw: zmq.Socket[bytes]) -> bool:
    """Returns whether one waits: a receive that finds none takes five times as long to say so, `poll` thrice."""
    return bool(int(raw.get(zmq.EVENTS)) & zmq.POLLIN)


def _receive(raw: zmq.Socket[bytes]) -> list[memoryview] | None:
    """Returns the frames of the next message, or None when nothing waits."""
    if not _has_message(raw):
        return None
    try:
        frame = raw.recv(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return None  # its connection has ended since
    frames = [frame.buffer]
    while frame.more:
        frame = raw.recv(zmq.DONTWAIT, copy=False)
        frames.append(frame.buffer)
    return frames


def _send(raw: zmq.Socket[bytes], frames: Sequence[bytes | memoryview]) -> None:
    """Sends without blocking. Raises zmq.Again, before anything is sent, and what a ROUTER says of its peer."""
    last = len(frames) - 1
    for place, frame in enumerate(frames):
        flags = zmq.DONTWAIT if place == last else zmq.DONTWAIT | zmq.SNDMORE
        raw.send(frame, flags, copy=len(frame) <= COPIED_BYTES)


def _size(frames: Sequence[bytes | memoryview]) -> int:
    return sum(len(frame) for frame in frames)


class Echo:
    """Sends whatever comes in over one connection back over it, on threads that do nothing else, until `close`.

    Whoever sends something learns how long this process takes to answer when its main thread computes, holds the
    interpreter or waits: the loop that answers is libzmq's own (`zmq_proxy`), which runs without the interpreter, and
    its context has an I/O thread to itself. What is silent here is stopped, cut off, or on a host that has no time for
    it.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: MessageSocket, endpoint: str) -> None:
        """`context` has no other socket; both belong to the echo from now on. Whoever has made it reads the socket's
        `link_events`, and nothing else of it."""
        self.endpoint = endpoint
        self.socket = socket
        self._context = context
        self._thread = threading.Thread(target=self._run, name="echo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it; returns when it has ended."""
        if self.socket.monitor is not None:
            self.socket.monitor.close(linger=0)
        self._context.term()  # waits for the socket, which only the thread may close
        self._thread.join()

    def _run(self) -> None:
        try:
            zmq.proxy(self.socket.raw, self.socket.raw)
        except zmq.ContextTerminated:
            return
        finally:
            self.socket.raw.close(linger=0)
