"""The router's sockets: control of all nodes, their lifelines, a PUSH for each pipeline, all results; and what the
lifelines and pulses say of nodes: which opened, closed, refuses, or is silent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
import zmq

from common.ids import NodeId, PipelineId
from common.messages import Failed, Header, Message
from common.node.control_link import NodeAddresses
from common.node.silence import EARLY, PATIENT, SilenceWatch
from common.topology import NodeDescription
from common.wire.endpoints import choose_endpoint, remove_socket_files, share_folder
from common.wire.transport import Full, LinkEvent, MessageSocket, Transport
from services.router.control.membership import ChangeReason, Membership, MembershipChange

_NUMBER = struct.Struct("<Q")
WITHIN_S = 0.005
"""For all addresses together; a host that is there refuses within a round trip, and one that is not says nothing."""
WAIT_MS = 50
ALONE = "no node is taken for dead: it may be this host that is cut off, or that stood still"
LATE = "many echoes come back late: this host's own link loses packets, so nodes are given longer"
SUSPICIOUS_S = 0.06
"""Longer than from one ping to the next."""
SUSPENSE_MS = 10
"""While a node is behind: a turn that comes 40 ms later sees a loss 40 ms later."""


class MeshClient:
    """Sends and receives messages; knows addresses, decides nothing. Only the mesh thread uses it, but for `wake`."""

    def __init__(
        self,
        transport: Transport,
        addresses: NodeAddresses,
        router_term: int,
        log: structlog.stdlib.BoundLogger,
        on_disk: Callable[[Callable[[], None]], None] = lambda job: job(),
    ) -> None:
        """`on_disk` does what touches the state folder, where a disk that hangs stops nothing else."""
        self._transport = transport
        self._ipc_token = addresses.folder_token
        self._folder = addresses.folder
        self.router_term = router_term
        self._log = log
        self._on_disk = on_disk
        self.control = transport.router("control", [addresses.control])
        self.results = transport.pull("results", [addresses.bind_pattern.format(socket="results")])
        self.pulses = transport.router("pulses", [addresses.bind_pattern.format(socket="pulse")])
        self._pulse_stamp = os.urandom(8)
        """A stamp of this process: a node may still answer what a router before this one asked."""
        self._lifelines: dict[NodeId, MessageSocket] = {}
        self._pipelines: dict[PipelineId, MessageSocket] = {}
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self.control.raw, zmq.POLLIN)
        self._poller.register(self.results.raw, zmq.POLLIN)
        self._poller.register(self._wake_reader, zmq.POLLIN)
        self._closed_bytes_sent = 0

    @property
    def step_bytes_sent(self) -> int:
        """Counts the bytes of steps to all first stages since start."""
        return self._closed_bytes_sent + sum(socket.bytes_sent for socket in self._pipelines.values())

    def wake(self) -> None:
        """Ends the current `wait`; may be called in any thread."""
        try:
            os.write(self._wake_writer, b"!")
        except BlockingIOError:
            return  # 64 KiB of wake-ups are waiting already

    def wait(self, timeout_ms: int) -> None:
        """Waits until a socket has something, `wake` was called, or the time is up."""
        for source, _ in self._poller.poll(timeout_ms):
            if source == self._wake_reader:
                os.read(self._wake_reader, 65536)

    def receive_control(self) -> tuple[NodeId, Message, Header] | None:
        """Returns the next control message with its sender."""
        received = self.control.receive()
        if received is None:
            return None
        identity, message, header = received
        return NodeId(identity.decode(errors="replace")), message, header

    def tell(self, node_id: NodeId, message: Message, header: Header | None = None) -> None:
        """Sends; dropped if the node is gone (its lifeline reports that). A node that receives Failed exits."""
        if isinstance(message, Failed):
            self._log.error("node_refused", node=node_id, code=message.code, reason=message.message)
        with contextlib.suppress(Full):
            self.control.send(node_id.encode(), message, replace(header or Header(), router_term=self.router_term))

    def ping(self, nodes: Iterable[NodeId], number: int) -> None:
        """Sends each node a ping of this number; one that is not there gets none.

        Echoes do not wake the loop: `wait` ends often enough, and one need not be seen the moment it comes.
        """
        payload = self._pulse_stamp + _NUMBER.pack(number)
        for node_id in nodes:
            try:
                self.pulses.raw.send_multipart([node_id.encode(), payload], flags=zmq.DONTWAIT)
            except zmq.Again:
                continue  # it echoes nothing, and would not echo this one either
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise

    def echoes(self) -> list[tuple[NodeId, int]]:
        """Returns nodes that have echoed since the last call, with the numbers of the pings."""
        found: list[tuple[NodeId, int]] = []
        while True:
            try:
                identity, *frames = self.pulses.raw.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                return found
            payload, stamp = frames[-1] if frames else b"", self._pulse_stamp
            if len(payload) == len(stamp) + _NUMBER.size and payload.startswith(stamp):
                found.append((NodeId(identity.decode(errors="replace")), _NUMBER.unpack(payload[len(stamp) :])[0]))

    def watch(self, description: NodeDescription) -> None:
        """Opens a node's lifeline. Raises ConfigurationError if it cannot be reached from here."""
        if description.node_id in self._lifelines:
            return
        endpoint = choose_endpoint(description.lifeline, description.ipc_token, self._ipc_token)
        lifeline = self._transport.dealer(f"lifeline of {description.node_id}", endpoint)
        self._lifelines[description.node_id] = lifeline
        self._poller.register(lifeline.monitor, zmq.POLLIN)

    def unwatch(self, node_id: NodeId) -> None:
        """Closes a node's lifeline; one that is not open is not an error."""
        lifeline = self._lifelines.pop(node_id, None)
        if lifeline is not None:
            self._poller.unregister(lifeline.monitor)
            lifeline.close()

    def remove_socket_files(self, description: NodeDescription) -> None:
        """Removes those of a node that is gone, which ZeroMQ leaves. Connections that stand are not touched."""
        if self._folder is None or not share_folder(description.ipc_token, self._ipc_token):
            return
        self._on_disk(partial(self._remove_socket_files, self._folder, description))

    def _remove_socket_files(self, folder: Path, description: NodeDescription) -> None:
        try:
            remove_socket_files(folder, description.node_id, (*description.endpoints, *description.lifeline))
        except OSError as error:
            self._log.warning("socket_files_not_removed", node=description.node_id, reason=str(error))

    def lifeline_events(self) -> list[tuple[NodeId, LinkEvent]]:
        """Returns lifelines that opened or closed since the last call; REFUSED where nothing listens any more."""
        events = [
            (node_id, event) for node_id, lifeline in list(self._lifelines.items()) for event in lifeline.link_events()
        ]
        closed = {self._lifelines[node_id].endpoints[0] for node_id, event in events if event is LinkEvent.CLOSED}
        if not closed or self._transport.limits.socks_proxy:  # behind a proxy addresses are not this host's to reach
            return events
        gone = refused(closed)
        return [
            (node_id, LinkEvent.REFUSED)
            if event is LinkEvent.CLOSED and self._lifelines[node_id].endpoints[0] in gone
            else (node_id, event)
            for node_id, event in events
        ]

    def open_pipeline(self, pipeline: PipelineId, first_stage: NodeDescription) -> None:
        """Connects to a pipeline's first stage with a new socket: what was queued for an older one is dropped."""
        self.close_pipeline(pipeline)
        endpoint = choose_endpoint(first_stage.endpoints, first_stage.ipc_token, self._ipc_token)
        self._pipelines[pipeline] = self._transport.push(f"pipeline {pipeline}", endpoint)

    def close_pipeline(self, pipeline: PipelineId) -> None:
        """Closes its socket; one that is not open is not an error."""
        socket = self._pipelines.pop(pipeline, None)
        if socket is not None:
            self._closed_bytes_sent += socket.bytes_sent
            socket.close()

    def send_step(self, pipeline: PipelineId, message: Message, header: Header) -> bool:
        """Returns False if the first stage does not take it (not connected yet, or gone): send it again."""
        try:
            self._pipelines[pipeline].send(message, header)
        except Full:
            return False
        return True

    def close(self) -> None:
        """Closes everything."""
        for node_id in list(self._lifelines):
            self.unwatch(node_id)
        for pipeline in list(self._pipelines):
            self.close_pipeline(pipeline)
        self.control.close()
        self.results.close()
        self.pulses.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)


def refused(endpoints: Iterable[str], within_s: float = WITHIN_S) -> set[str]:
    """Returns, of these (`ipc://PATH` or `tcp://ADDRESS:PORT`), those where a connection is refused: nothing listens.

    What listened there has ended, or has closed its sockets: there is no need to wait. All else proves nothing: a
    connection that stands, one that gets no answer in time, a path that is gone, an address that is a name.
    """
    with contextlib.ExitStack() as probes:
        errors: dict[str, int] = {}
        waiting: dict[int, tuple[str, socket.socket]] = {}
        poll = select.poll()  # `select.select` takes no descriptor above 1023
        for endpoint in endpoints:
            probe, errors[endpoint] = _connect(endpoint)
            if probe is not None:
                probes.enter_context(probe)
                if errors[endpoint] == errno.EINPROGRESS:
                    waiting[probe.fileno()] = endpoint, probe
                    poll.register(probe, select.POLLOUT)
        deadline_s = time.monotonic() + within_s
        while waiting and (left_s := deadline_s - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left_s * 1000):
                endpoint, probe = waiting.pop(descriptor)
                poll.unregister(descriptor)
                errors[endpoint] = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return {endpoint for endpoint, error in errors.items() if error == errno.ECONNREFUSED}


def _connect(endpoint: str) -> tuple[socket.socket | None, int]:
    kind, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        if kind == "ipc":
            probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        elif kind == "tcp" and port.isdecimal() and _is_numeric(host):
            probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        else:
            return None, 0
    except OSError:
        return None, 0  # no descriptor is left: then there is no proof
    probe.setblocking(False)
    return probe, probe.connect_ex(address if kind == "ipc" else (host, int(port)))


def _is_numeric(host: str) -> bool:
    """Says whether it is an address: a name would have to be looked up, which may take long."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return False


class Witnesses:
    """Hears what lifelines and pulses say of nodes. `look` is called in each turn of the loop."""

    def __init__(self, client: MeshClient, membership: Membership, log: structlog.stdlib.BoundLogger) -> None:
        self._client = client
        self._membership = membership
        self._log = log
        self._watch = SilenceWatch()
        self._told: frozenset[NodeId] = frozenset()
        self._was_alone = self._was_late = False
        self._is_suspense = False

    @property
    def wait_ms(self) -> int:
        """Returns how long the loop may wait for a socket to say something."""
        return SUSPENSE_MS if self._is_suspense else WAIT_MS

    def look(
        self,
        now_s: float,
        nodes: Mapping[NodeId, NodeDescription],
        replaceable: Callable[[Set[NodeId]], Sequence[NodeId]],
    ) -> list[MembershipChange]:
        """Returns what has changed by them. `replaceable`: those silent nodes in whose place another one goes on at
        once. There a wrong death costs little, and a right one saves much."""
        changes: list[MembershipChange] = []
        for node_id, event in self._client.lifeline_events():
            if (node := nodes.get(node_id)) is None:
                continue
            if event is LinkEvent.CONNECTED:
                changes += self._membership.lifeline_opened(node_id, node.incarnation, now_s)
            elif event is LinkEvent.CLOSED:
                changes += self._membership.lifeline_closed(node_id, node.incarnation, now_s)
            else:
                changes += self._membership.lose(node_id, node.incarnation, ChangeReason.LIFELINE_CLOSED)
        self._exchange_pulses(now_s, nodes)
        self._membership.is_alone, self._membership.is_late = self._watch.is_alone, self._watch.is_late
        early, long = (frozenset(map(NodeId, self._watch.silent(nodes, patience))) for patience in (EARLY, PATIENT))
        self._tell(early)
        for node_id in sorted({*replaceable(early), *long}):
            changes += self._membership.lose(node_id, nodes[node_id].incarnation, ChangeReason.NO_PULSE)
        return changes

    def answered(self, node_ids: Iterable[NodeId], ago_s: float) -> None:
        """Notes that these have all had a part in a step that was sent this long ago and has come back."""
        for node_id in node_ids:
            self._watch.answered(node_id, ago_s)

    def forget(self, node_id: NodeId) -> None:
        """Forgets a node that is gone; an unknown one is not an error."""
        self._watch.forget(node_id)

    def _exchange_pulses(self, now_s: float, nodes: Collection[NodeId]) -> None:
        is_due = self._watch.turn(now_s)
        for node_id, ping in self._client.echoes():
            if node_id in nodes:  # one that was declared dead may still answer
                self._watch.echoed(node_id, ping)
        self._is_suspense = any(self._watch.silence_s(node_id) > SUSPICIOUS_S for node_id in nodes)
        if is_due:
            self._client.ping(nodes, self._watch.last_ping)

    def _tell(self, silent: frozenset[NodeId]) -> None:
        for node_id in sorted(silent - self._told):
            silent_s, explained_s = self._watch.silence_s(node_id), self._watch.explained_s(node_id, EARLY)
            self._log.info("node_silent", node=node_id, silent_s=round(silent_s, 3), explained_s=explained_s)
        self._told = silent
        if self._watch.is_alone and not self._was_alone:
            self._log.warning("all_nodes_silent", detail=ALONE)
        if self._watch.is_late and not self._was_late:
            self._log.warning("many_nodes_late", detail=LATE)
        self._was_alone, self._was_late = self._watch.is_alone, self._watch.is_late
