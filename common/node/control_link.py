"""A node's side of the control link: say hello (again, whenever the router comes back), beat, leave.

A node is anonymous until the router assigns it a role. The link is a DEALER whose identity is the node's id; the
lifeline is a bound socket that carries nothing: the router connects to it and sees it close when this process ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from common.config import Settings
from common.errors import (
    ConfigurationError,
    MoemeshError,
    NodeLostError,
    NotReadyError,
    SocketError,
    error_from_wire,
)
from common.ids import Incarnation, NodeId
from common.messages import (
    ExpertHeartbeat,
    Failed,
    Header,
    Hello,
    Leave,
    LeaveAcknowledged,
    Message,
    StageHeartbeat,
    Welcome,
)
from common.node.silence import EARLY
from common.topology import NodeKind
from common.wire.endpoints import choose_endpoint, ipc_folder, ipc_token
from common.wire.tcp_addresses import (
    advertised_host,
    bracketed,
    control_host,
    is_ipv6,
    is_loopback,
    own_address,
    speaks_ipv6,
)
from common.wire.transport import Full, LinkEvent, MessageSocket, Transport

log = structlog.get_logger(__name__)

SILENCE_S = 5.0
"""How long a router may be silent before the log says so; then twice as long each time."""
HELLO_INTERVAL_S = 1.0
AWAY_S = EARLY.shortest_s
"""A loop that has not turned for this long may belong to a process that was stopped, and was taken for dead."""


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """Where this process listens and where the router is."""

    control: str
    folder_token: str
    bind_pattern: str
    """A pattern with `{socket}` in place of the socket's name."""
    public_host: str = ""
    """Peers reach a tcp socket that is bound to all addresses by this name or address."""
    folder: Path | None = None
    """The folder of the mesh's socket files, where there are any."""

    def advertised(self, bound: tuple[str, ...]) -> tuple[str, ...]:
        """Endpoints as peers are to use them."""
        host = bracketed(self.public_host)
        return tuple(re.sub(r"//(0\.0\.0\.0|\[::\]):", f"//{host}:", endpoint) for endpoint in bound)


def find_addresses(settings: Settings, node_id: NodeId) -> NodeAddresses:
    """Returns ipc when the control endpoint is ipc (one host, one folder), tcp on the node's own address otherwise."""
    control = settings.control
    if not control or control.startswith("ipc://"):
        folder = ipc_folder(settings.state_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(f"STATE_DIR={settings.state_dir} cannot be used: {error}") from None
        if folder.stat().st_uid != os.getuid():
            # The stand-in for a long path lies where anybody may make folders.
            raise ConfigurationError(f"the folder for socket files, {folder}, belongs to another user")
        escaped = str(folder).replace("{", "{{").replace("}", "}}")
        return NodeAddresses(
            control or f"ipc://{folder}/control",
            ipc_token(folder),
            f"ipc://{escaped}/{node_id}-{{socket}}",
            folder=folder,
        )
    host = control_host(control)
    with_ipv6 = not settings.socks_proxy and speaks_ipv6(host)
    if settings.advertise_host:
        public_host = advertised_host(settings.advertise_host)
        # An IPv6 socket on all addresses takes IPv4 connections, too.
        everywhere = "tcp://[::]:*" if with_ipv6 or is_ipv6(public_host) else "tcp://0.0.0.0:*"
        return NodeAddresses(control, "", everywhere, public_host)
    if is_loopback(host):
        return NodeAddresses(control, "", "tcp://[::1]:*" if with_ipv6 else "tcp://127.0.0.1:*")
    return NodeAddresses(control, "", f"tcp://{bracketed(own_address(with_ipv6))}:*")


def draw_identity(kind: NodeKind) -> tuple[NodeId, Incarnation]:
    """Returns a new incarnation, and the name that people see for it."""
    incarnation = secrets.randbits(62) + 1
    return NodeId(f"{kind.value}-{incarnation:016x}"), Incarnation(incarnation)


class ControlLink:
    """The control socket of one node. The owner calls `receive` and `beat` from its loop."""

    def __init__(self, transport: Transport, addresses: NodeAddresses, hello: Hello) -> None:
        """`hello`: what this node says of itself, without what it holds."""
        self.hello = hello
        self._silent_since_s: float | None = None
        self._tell_after_s = SILENCE_S
        self.add_held: Callable[[Hello], Hello] = lambda hello: hello
        """Adds to each hello what is held from a router before; set by a node that holds something."""
        self.router_term = 0
        self._settings: Welcome | None = None
        self._is_welcome = False
        self.socket: MessageSocket = transport.dealer("control", addresses.control, identity=hello.node_id.encode())
        self._transport = transport
        self._connected = False
        self._looked_s: float | None = None
        self._may_be_dead = False
        """Socket files were gone after an absence that is long enough to be taken for dead: it may be why."""
        self._next_hello_s = 0.0
        self._next_beat_s = 0.0
        self.is_leaving = self.leave_acknowledged = False

    @property
    def registered(self) -> bool:
        """Returns whether the router that is connected now has taken this node in."""
        return self._connected and self._is_welcome

    @property
    def settings(self) -> Welcome:
        """Returns what the router said last, also while it is away. Raises NotReadyError before the first welcome."""
        if self._settings is None:
            raise NotReadyError("no router has welcomed this node yet")
        return self._settings

    def receive(self, now_s: float) -> list[tuple[Message, Header]]:
        """Returns what the router asks; hello, welcome and heartbeats are dealt with here.

        Raises the router's refusal (wrong checkpoint, wrong version) as the error that it carries, and NodeLostError
        where this incarnation is over: declared dead, or it may have been by a router that is gone.
        """
        self._notice_silence(now_s)
        self._look_after_sockets(now_s)
        for event in self.socket.link_events():
            self._connected = event is LinkEvent.CONNECTED
            self._is_welcome = False
            self._next_hello_s = 0.0
            if self._connected:
                self._forget_unread()
        if self._connected and not self._is_welcome and now_s >= self._next_hello_s:
            self._next_hello_s = now_s + HELLO_INTERVAL_S
            self._refuse_to_join_dead()
            self.send(self.add_held(self.hello))
        asked: list[tuple[Message, Header]] = []
        while (received := self.socket.receive()) is not None:
            message, header = received
            if header.router_term < self.router_term:
                continue  # a router that was replaced woke up; it is fenced
            self.router_term = header.router_term
            self._may_be_dead = False  # a dead node would have been told so
            if isinstance(message, Welcome):
                self._settings, self._is_welcome = message, True
                self._have_a_pulse(message)
            elif isinstance(message, Failed):
                raise error_from_wire(message.code, message.message)
            elif isinstance(message, LeaveAcknowledged):
                self.leave_acknowledged = True
            else:
                asked.append((message, header))
        return asked

    def send(self, message: Message, header: Header | None = None) -> bool:
        """Send to the router; False while it is away (what matters is said again after the next hello)."""
        try:
            self.socket.send(message, replace(header or Header(), router_term=self.router_term))
        except Full:
            return False
        return True

    def fail(self, error: MoemeshError, header: Header | None = None) -> None:
        """Tell the router that what it asked cannot be done."""
        self.send(Failed(error.code, error.message), header)

    def beat(self, now_s: float, load: Callable[[], StageHeartbeat | ExpertHeartbeat]) -> None:
        """Send a heartbeat when one is due."""
        if self.registered and now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self.settings.heartbeat_interval_ms / 1000
            self.send(replace(load(), is_leaving=self.is_leaving))

    def leave(self, reason: str) -> None:
        """Ask the router to let this node go; `leave_acknowledged` turns true when it may. Heartbeats say so too."""
        self.is_leaving = True
        self.send(Leave(reason))

    def _have_a_pulse(self, welcome: Welcome) -> None:
        """Without one the router sees a loss all the same, by the lifeline, only later."""
        if welcome.pulse:
            own = self.hello
            endpoint = choose_endpoint(welcome.pulse, welcome.pulse_ipc_token, own.ipc_token)
            with contextlib.suppress(SocketError):  # tried again with the next welcome
                self._transport.echo(endpoint, own.node_id.encode())

    def _notice_silence(self, now_s: float) -> None:
        if self.registered or self._silent_since_s is None:
            self._silent_since_s, self._tell_after_s = now_s, SILENCE_S
        elif now_s - self._silent_since_s >= self._tell_after_s:
            self._tell_after_s *= 2
            self._tell_silence(now_s - self._silent_since_s)

    def _tell_silence(self, silent_s: float) -> None:
        what = "says nothing" if self._connected else "is not there; CONTROL must name it"
        reason = f"the router at {self.socket.endpoints[0]} {what}"
        log.warning("no_router", reason=reason, silent_s=round(silent_s))

    def _forget_unread(self) -> None:
        """Drops what came over the connection before, whose router may be gone: obeyed after the hello to the next one,
        it would change what that hello says is held here. What a router still wants, it tells again. Raises its
        refusal."""
        while (received := self.socket.receive()) is not None:
            message, header = received
            if isinstance(message, Failed) and header.router_term >= self.router_term:
                raise error_from_wire(message.code, message.message)
            self.router_term = max(self.router_term, header.router_term)

    def _look_after_sockets(self, now_s: float) -> None:
        """Socket files are recreated, no matter who removed them. But a router that takes a node for dead removes them,
        too, and one that came after that router does not know: a node that was away for long must not just go on.
        """
        was_away = self._looked_s is not None and now_s - self._looked_s > AWAY_S
        self._looked_s = now_s
        if self._transport.look_after_files(now_s, at_once=was_away) and was_away:
            self._may_be_dead = True

    def _refuse_to_join_dead(self) -> None:
        if self._may_be_dead:
            raise NodeLostError(
                f"the socket files of {self.hello.node_id} were gone after a pause: a router took it for dead; "
                "come back as another incarnation"
            )
