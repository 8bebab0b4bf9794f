"""What a stage and an expert process do alike: sockets, registration, SIGTERM, one sentence when it cannot start."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import structlog

from common.checkpoint.directory import resolve_model
from common.checkpoint.model_config import ModelConfig, read_model_config
from common.checkpoint.part import refuse_useless_part, see_checkpoint
from common.config import Settings, setting_names
from common.errors import MoemeshError, NodeLostError
from common.log import LogStream, configure_log, unbuffered
from common.messages import Hello
from common.misspelt_settings import misspelt_settings
from common.node.control_link import ControlLink, draw_identity, find_addresses
from common.node.loader_thread import LoaderThread
from common.standard_streams import open_closed_streams
from common.topology import CheckpointPart, NodeKind
from common.wire.tcp_addresses import control_host, speaks_ipv6
from common.wire.transport import MessageSocket, RoutingSocket, SocketLimits, Transport
from common.wire.zmq_functions import link_limits

DataSocket = TypeVar("DataSocket", MessageSocket, RoutingSocket)


class StopFlag:
    """Set by SIGTERM or SIGINT; calling it tells whether to stop."""

    def __init__(self) -> None:
        self._stopping = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def __call__(self) -> bool:
        return self._stopping

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True


class NodeResources:
    """What outlives an incarnation of a node: what does not change, and the wish to stop.

    It is made once per process, without torch. Kernels and weights are the node's own to keep.
    """

    def __init__(
        self, settings: Settings, log: structlog.stdlib.BoundLogger, free_bytes: Callable[[ModelConfig], int]
    ) -> None:
        """`free_bytes`: what the node may offer where no setting says it. Raises MoemeshError for a model that cannot
        be served."""
        self.should_stop = StopFlag()
        self.log = log
        self.checkpoint = resolve_model(settings.model)
        self.config = read_model_config(self.checkpoint)
        # Once: what an incarnation holds does not make the next one smaller.
        capacity_bytes = settings.capacity_bytes or free_bytes(self.config)
        self.settings = settings.model_copy(update={"capacity_bytes": capacity_bytes})
        self.seen = see_checkpoint(self.checkpoint, self.config)
        self.loader = LoaderThread()
        self.router_term = 0
        """The highest one heard: a router that was fenced stays so."""


def machine_label(boot_id: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Returns a word that is the same for all processes of one running kernel, in containers too: copies on it are lost
    together."""
    return boot_id.read_text().strip()[:13] if boot_id.exists() else socket.gethostname()


def open_transport(settings: Settings, log: structlog.stdlib.BoundLogger) -> Transport:
    """Returns a transport for the links that the settings ask for."""
    is_tcp = settings.control.startswith("tcp://")
    if is_tcp:
        log.warning("links_unencrypted", detail="sockets have no encryption or authentication: use a private network")
    with_ipv6 = is_tcp and not settings.socks_proxy and speaks_ipv6(control_host(settings.control))
    return Transport(SocketLimits(ipv6=with_ipv6, socks_proxy=settings.socks_proxy))


@dataclass(frozen=True, slots=True)
class NodeProcess(Generic[DataSocket]):
    """The outside of a node in one incarnation: everything but its work."""

    transport: Transport
    control: ControlLink
    lifeline: RoutingSocket
    data: DataSocket
    """Where others bring their work."""
    ipc_token: str
    log: structlog.stdlib.BoundLogger
    """A logger that names the node."""
    rings_folder: Path | None = None
    """Where nodes of one host find each other for calls through shared memory; None: they do not."""
    links: RoutingSocket | None = None
    """Where stages that share no memory with this node bring their calls, for native code; None: as messages."""
    numeric_class: str = ""


@contextlib.contextmanager
def open_node(
    kind: NodeKind,
    own: NodeResources,
    numeric_class: str,
    open_data: Callable[[Transport, str], DataSocket],
    *,
    has_links: bool = False,
) -> Iterator[NodeProcess[DataSocket]]:
    """Opens one incarnation: its sockets are closed in the end, and the router's term is kept for the next one.

    `open_data` makes the data socket, bound to the address that it is given. `has_links`: native code can answer calls
    that come over tcp, if the settings allow it.
    """
    refuse_useless_part(own.seen.part, kind, own.settings.model)
    transport = open_transport(own.settings, own.log)
    try:
        node = _bind_node(kind, own, numeric_class, transport, open_data, has_links)
        node.control.router_term = own.router_term
        try:
            yield node
        finally:
            own.router_term = node.control.router_term
    finally:
        transport.close()


def _bind_node(
    kind: NodeKind,
    own: NodeResources,
    numeric_class: str,
    transport: Transport,
    open_data: Callable[[Transport, str], DataSocket],
    has_links: bool,
) -> NodeProcess[DataSocket]:
    node_id, incarnation = draw_identity(kind)
    addresses = find_addresses(own.settings, node_id)
    # Nothing is sent on it; that it closes tells the router that this process has ended.
    lifeline = transport.router("lifeline", [addresses.bind_pattern.format(socket="lifeline")])
    data = open_data(transport, addresses.bind_pattern.format(socket="data"))
    is_native = own.settings.call_rings == "auto"
    links = None
    if has_links and is_native and addresses.bind_pattern.startswith("tcp://"):
        bound = [addresses.bind_pattern.format(socket="links")]
        links = transport.router("links", bound, link_limits(transport.limits))
    part = own.seen.part or CheckpointPart()  # the whole checkpoint is said by leaving both out
    hello = Hello(
        node_id=node_id,
        incarnation=incarnation,
        node_kind=kind.value,
        capacity_bytes=own.settings.capacity_bytes,
        host_label=own.settings.host_label or machine_label(),
        numeric_class=numeric_class,
        fingerprint=own.seen.fingerprint,
        endpoints=addresses.advertised(data.endpoints),
        lifeline=addresses.advertised(lifeline.endpoints),
        ipc_token=addresses.folder_token,
        process=f"{socket.gethostname()}/{os.getpid()}",
        part_layers=part.layers or (),
        part_experts=tuple(sorted(part.experts)),
        links=() if links is None else addresses.advertised(links.endpoints),
    )
    control = ControlLink(transport, addresses, hello)
    log, named = own.log.bind(node=node_id), own.settings.rings_folder
    folder = Path(named) if named else addresses.folder
    return NodeProcess(
        transport,
        control,
        lifeline,
        data,
        addresses.folder_token,
        log,
        folder if is_native else None,
        links,
        numeric_class,
    )


LOG_WITHIN_S = 1.0
"""How long the end of a process waits for the reader of its log."""


def run_lives(live: Callable[[], None], log: structlog.stdlib.BoundLogger) -> None:
    """Serve, again and again as another incarnation where a router takes this one for dead (it was paused or cut off).

    What makes it slow to start, its weights, a process need not lose for that. `live` serves once, closes all its
    sockets also when it raises, and raises what ends the process, or NodeLostError where only this incarnation is over.
    """
    while True:
        try:
            return live()
        except NodeLostError as error:
            log.warning("node_rejoining", reason=str(error))
        # Services and links refer to each other, and to gigabytes of K and V that must not wait for the collector.
        gc.collect()


def run_process(service: str, level: str, work: Callable[[structlog.stdlib.BoundLogger], None]) -> int:
    """Run a process's work; what is wrong with settings, checkpoint or mesh ends in one logged sentence and exit 1."""
    open_closed_streams()
    stream = LogStream(unbuffered(sys.stderr))
    log = configure_log(service, level, stream)
    try:
        for sentence in misspelt_settings(os.environ, setting_names()):
            log.warning("unknown_setting", reason=sentence)
        raise_descriptor_limit()
        work(log)
    except MoemeshError as error:
        log.error("process_stopping_on_error", code=error.code, reason=str(error))
        stream.write(f"moemesh {service}: {error}\n")
        return 1
    finally:
        stream.drain(LOG_WITHIN_S)
    return 0


def end_process(status: int) -> NoReturn:
    """End now. A load that hangs on a disk would else keep the process, and no other would start in its place."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it has no reader any more
            stream.flush()
    os._exit(status)


MAX_DESCRIPTORS = 1 << 16
"""More than any mesh of this kind needs; without a bound a container's limit of a billion would be asked for."""


def raise_descriptor_limit() -> None:
    """Raises the limit as far as the system lets a process by itself: a shell's usual 1,024 are for programs that use
    `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a sandbox may forbid it; what there is must do then
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """Returns what this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
