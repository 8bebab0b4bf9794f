"""The native thread that answers the calls of stages (native/call_server.h), and the rings through which they come: who
has handed one over. What comes over links is between the thread and its socket."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from common.compute.gated_ffn import GatedExpert
from common.compute.native_library import NativeKernels
from common.errors import ProtocolError
from common.topology import ShardId
from common.wire.call_ring import (
    RingMemory,
    RingOffer,
    new_bell,
    receive_offer,
    ring_path,
    ring_shape,
    send_verdict,
)
from common.wire.transport import RoutingSocket
from common.wire.zmq_functions import ZmqFunctions
from services.expert.shard_store import ShardStore

_BACKLOG = 64
MAX_LINKS = 256
"""Stages, and what else connects; who is beyond that waits."""
OFFER_S = 5.0
"""How long a connection may bring no ring."""
RETRY_S = 1.0
"""How long after a thread could not be started it is tried again."""
FILE_INTERVAL_S = 1.0
"""How often the file of the listening socket is looked for."""
_NO_WEIGHTS = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class RingCounts:
    """What the thread has done since the rings were opened, and what it has in hand now."""

    steps: int = 0
    rows: int = 0
    busy_ns: int = 0
    answer_bytes: int = 0
    refused: int = 0
    in_hand: int = 0


class NodeLinks(ctypes.Structure):
    """Where links come in; mirrors `NodeLinks` in native/call_server.h."""

    _fields_ = [("zmq", ctypes.c_void_p), ("socket", ctypes.c_void_p), ("incarnation", ctypes.c_int64)]


@dataclass(frozen=True, slots=True)
class LinkSocket:
    """The socket for links, which nobody touches but the native thread while there is one."""

    socket: RoutingSocket
    functions: ZmqFunctions


class CallThread:
    """The native thread that serves the calls of one store's shards."""

    def __init__(self, store: ShardStore, kernels: NativeKernels, links: NodeLinks) -> None:
        """Raises OSError where there is no descriptor or no thread left."""
        config = store.config
        self.shape = ring_shape(
            config.hidden_size, store.dtype.itemsize, config.num_experts_per_token * store.num_slices
        )
        self.bell = new_bell()
        self._kernels = kernels
        self._store = store
        self._shards_per_layer = config.num_experts * store.num_slices
        self._memories: dict[int, RingMemory] = {}
        self._handle = kernels.start_call_server(
            config.num_layers,
            self._shards_per_layer,
            ctypes.byref(self.shape),
            int(store.dtype.itemsize == 2),
            kernels.threads,
            self.bell,
        )
        if not self._handle:
            os.close(self.bell)
            raise OSError("no thread can be started; a limit of threads or processes (`ulimit -u`) is reached")
        store.watch(self._changed)
        kernels.open_links(self._handle, ctypes.byref(links))

    def add(self, number: int, memory: RingMemory, stage_bell: int) -> None:
        """Serves this ring from now on."""
        self._memories[number] = memory
        self._kernels.add_ring(self._handle, number, memory.address, stage_bell)

    def remove(self, number: int) -> None:
        """Does not look at this ring any more; returns when no call of it is under way."""
        self._kernels.remove_ring(self._handle, number)
        self._memories.pop(number, None)

    def counts(self) -> RingCounts:
        """Returns what was counted."""
        numbers = (ctypes.c_int64 * 6)()
        self._kernels.read_call_counts(self._handle, ctypes.addressof(numbers))
        return RingCounts(*numbers)

    def close(self) -> RingCounts:
        """Ends the thread, and returns what was counted."""
        self._store.watch(None)
        counts = self.counts()
        self._kernels.end_call_server(self._handle)
        os.close(self.bell)
        return counts

    def _changed(self, changed: Mapping[ShardId, GatedExpert | None]) -> None:
        """Shards are there now, or go: what was there before is in no use any more when this returns."""
        places = array("q")
        for shard, expert in changed.items():
            place = shard.layer * self._shards_per_layer + shard.expert * self._store.num_slices + shard.slice_index
            places.extend((place, *(_NO_WEIGHTS if expert is None else expert.group_fields)))
        self._kernels.set_held_shards(self._handle, places.buffer_info()[0], len(changed))


@dataclass(slots=True)
class _Link:
    """A connection of a stage, and its ring once it has handed one over."""

    connection: socket.socket
    since_s: float
    bell: int | None = None


@dataclass(slots=True)
class RingServer:
    """Has the thread, takes rings in, and gives them up with their stages. The owner calls `look` in each turn of its
    loop."""

    folder: Path | None
    """Where stages of this host look for it; None: calls come over links alone."""
    node_id: str
    incarnation: int
    kernels: NativeKernels
    log: structlog.stdlib.BoundLogger
    clock: Callable[[], float] = time.monotonic
    open_thread: Callable[[ShardStore, NativeKernels, NodeLinks], CallThread] = CallThread
    links: LinkSocket | None = None
    _listener: socket.socket | None = None
    _identity: tuple[int, int] | None = None
    """Of the file by which stages find it."""
    _trouble: str = ""
    """Why there is none now, as it was logged."""
    _look_for_file_s: float = 0.0
    _open_after_s: float = 0.0
    _thread: CallThread | None = None
    _store: ShardStore | None = None
    _links: dict[int, _Link] = field(default_factory=dict)
    _num_links: int = 0
    _ended: list[RingCounts] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self._look_after_file(self.folder)

    def look(self, store: ShardStore | None) -> None:
        """Takes in what has come. `store`: the shards that calls are answered with now; with another one all rings are
        given up, and their stages hand over new ones."""
        now_s = self.clock()
        if store is not self._store:
            self._give_all_up()
            self._store, self._open_after_s = store, 0.0
        if self._thread is None and store is not None and now_s >= self._open_after_s:
            self._open(store, now_s)
        if self.folder is not None and now_s >= self._look_for_file_s:
            self._look_for_file_s = now_s + FILE_INTERVAL_S
            self._look_after_file(self.folder)
        self._accept(now_s)
        for number, link in list(self._links.items()):
            self._look_at(number, link, now_s)

    def counts(self) -> RingCounts:
        """Returns the sums over all stores."""
        now = [self._thread.counts()] if self._thread is not None else []
        every = [*self._ended, *now]
        return RingCounts(*(sum(getattr(one, name) for one in every) for name in RingCounts.__slots__))

    def close(self) -> None:
        """Gives all rings up, and listens no more."""
        self._give_all_up()
        if self._listener is not None:
            self._listener.close()
        with suppress(OSError):
            if self.folder is not None and _identity_of(self._path_in(self.folder)) == self._identity:
                self._path_in(self.folder).unlink()

    def _path_in(self, folder: Path) -> Path:
        return ring_path(folder, self.node_id)

    def _open(self, store: ShardStore, now_s: float) -> None:
        try:
            self._thread = self.open_thread(store, self.kernels, self._node_links())
        except OSError as error:
            self.log.warning("no_rings", folder=str(self.folder), reason=str(error))
            self._open_after_s = now_s + RETRY_S

    def _node_links(self) -> NodeLinks:
        if self.links is None:
            return NodeLinks(None, None, self.incarnation)
        raw = self.links.socket.raw
        return NodeLinks(ctypes.addressof(self.links.functions), raw.underlying, self.incarnation)

    def _accept(self, now_s: float) -> None:
        try:
            while self._listener is not None and len(self._links) < MAX_LINKS:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._num_links += 1
                self._links[self._num_links] = _Link(connection, now_s)
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor is left, say: whoever waits is taken in later
            self.log.warning("ring_not_taken", reason=str(error))

    def _look_after_file(self, folder: Path) -> None:
        """Without its file no stage finds the way here. One that is gone, or something else, is made again."""
        path = self._path_in(folder)
        try:
            if self._identity is not None and _identity_of(path) == self._identity:
                return
            if self._listener is None:
                _remove_abandoned(folder)
            listener = _listen(path)
        except OSError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self.log.warning("no_rings", folder=str(folder), reason=self._trouble)
            return
        if self._listener is not None:
            self._listener.close()
            self.log.warning("ring_file_made_again", path=str(path), reason="it was gone, or something else")
        self._listener, self._identity, self._trouble = listener, _identity_of(path), ""

    def _look_at(self, number: int, link: _Link, now_s: float) -> None:
        try:
            if link.bell is None and now_s - link.since_s > OFFER_S:
                raise ProtocolError(f"no ring was offered within {OFFER_S:.0f} s")
            if link.bell is not None:
                if link.connection.recv(1) == b"":
                    raise ConnectionResetError("the stage is gone")
                raise ProtocolError("a stage says nothing after its offer")
            offer = receive_offer(link.connection)
            refusal = self._take_in(number, offer)
            send_verdict(link.connection, refusal, self._thread.bell if self._thread is not None else -1)
            if refusal:
                self.log.warning("ring_refused", reason=refusal)
                self._drop(number)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            if link.bell is not None:
                self.log.info("ring_closed", reason=str(error))
            self._drop(number)

    def _take_in(self, number: int, offer: RingOffer) -> str:
        """Returns why the ring is refused; empty: it is in use now. What came with it is kept, or closed."""
        refusal = self._why_not(offer)
        if refusal:
            os.close(offer.descriptor)
            os.close(offer.bell)
            return refusal
        assert self._thread is not None, "else it was refused"
        self._links[number].bell = offer.bell
        try:
            memory = RingMemory(offer.descriptor, offer.shape)
        except (OSError, ValueError) as error:
            return f"its memory cannot be mapped: {error}"
        self._thread.add(number, memory, offer.bell)
        return ""

    def _why_not(self, offer: RingOffer) -> str:
        if offer.incarnation != self.incarnation:
            return f"it is for incarnation {offer.incarnation}, this is {self.incarnation}"
        if self._thread is None:
            return "no shards are assigned here yet"
        if offer.shape != self._thread.shape:
            return f"its shape is {offer.shape.sizes}, this node's is {self._thread.shape.sizes}"
        return ""

    def _drop(self, number: int) -> None:
        link = self._links.pop(number)
        if self._thread is not None:
            self._thread.remove(number)
        link.connection.close()
        if link.bell is not None:
            os.close(link.bell)

    def _give_all_up(self) -> None:
        for number in list(self._links):
            self._drop(number)
        if self._thread is not None:
            self._ended.append(self._thread.close())
            self._thread = None


def _listen(path: Path) -> socket.socket:
    """Returns what stages connect to. It listens before it has its name, so that whoever finds it can. Raises
    OSError."""
    listener, unnamed = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), path.with_name(f"{path.name}~")
    try:
        unnamed.unlink(missing_ok=True)
        listener.bind(str(unnamed))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        unnamed.rename(path)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_abandoned(folder: Path) -> None:
    """Removes the sockets that nodes have left which were killed: nobody listens there."""
    for path in (*folder.glob("*-rings"), *folder.glob("*-rings~")):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            if not path.is_socket():
                continue  # nothing of ours
            asking.setblocking(False)
            try:
                asking.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
