"""A SOCKS5 proxy that all TCP links of a mesh go through, so that what travels on them can be delayed, held, cut short.

Nodes are told of it by one setting (`SOCKS_PROXY`), which ZeroMQ itself obeys: a node connects to the proxy and names
the address it wants. That was chosen over addresses that a node advertises for a stand-in (product code that knows of
the harness, one stand-in for each socket) and over redirection in the node's network namespace (root, and connections
that exist must be broken first). The proxy runs on a thread of the harness; a mesh through it is slower by two hops.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

from chaos.proxy.link_rules import LinkRule, combined
from chaos.proxy.zmtp_frames import FrameDamage, FrameRule, Message, Passage, ZmtpStream, write_message
from chaos.target import Target, TargetError

Identify = Callable[[str, int], str]
"""It names the node at a host and port, or "" if it is unknown."""
Cut = Callable[[str, str, Message], bool]
"""It says of a message, and of the nodes that it comes from and goes to, whether the connection ends in its middle."""
Resolve = Callable[[str], str]
"""It turns a host name as a node says it into one that this process can connect to."""
_Result = TypeVar("_Result")
_PORT = struct.Struct(">H")
_GRANTED, _UNREACHABLE = b"\5\0\0\1\0\0\0\0\0\0", b"\5\5\0\1\0\0\0\0\0\0"
CALL_TIMEOUT_S = CLOSE_TIMEOUT_S = 5.0
CHUNK_BYTES = 1 << 18
QUEUED_PASSAGES = 256
"""A stalled direction reads no more than these: then the sender's own buffers fill, as they would on a dead net."""


class RuleBook:
    """The rules that hold now. It belongs to the proxy's loop."""

    def __init__(self) -> None:
        self.rules: list[LinkRule] = []
        self.cuts: list[Cut] = []
        self._changed = asyncio.Event()

    def add(self, rules: Sequence[LinkRule]) -> None:
        """Adds rules, which hold from now on."""
        self._change([*self.rules, *rules])

    def remove(self, rules: Sequence[LinkRule]) -> None:
        """Removes each rule once; one that does not hold is not an error."""
        left = list(self.rules)
        for rule in rules:
            if rule in left:
                left.remove(rule)
        self._change(left)

    async def wait_until_open(self, one: str, other: str) -> None:
        """Waits until neither direction between the two is stalled."""
        await self.wait_until_flowing(one, other)
        await self.wait_until_flowing(other, one)

    async def wait_until_flowing(self, source: str, destination: str) -> None:
        """Waits until that direction is not stalled."""
        while combined(self.rules, source, destination).is_stalled:
            await self._changed.wait()

    def _change(self, rules: list[LinkRule]) -> None:
        self.rules = rules
        self._changed.set()
        self._changed = asyncio.Event()


class Pipe:
    """One direction of a link: what comes in goes on late, slowly, damaged or not at all."""

    def __init__(self, book: RuleBook, source: str, destination: str) -> None:
        self._book = book
        self._ends = (source, destination)
        self._stream = ZmtpStream()
        self._damages: dict[FrameRule, FrameDamage] = {}
        self._queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(QUEUED_PASSAGES)
        self._writer: asyncio.StreamWriter | None = None
        self._is_muted = False
        self._keeps_end = False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carries bytes until the stream has ended and all of it has been written."""
        self._writer = writer
        reading = asyncio.create_task(self._read(reader))
        try:
            await self._write(writer)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if self._keeps_end:
            await asyncio.Event().wait()  # the end is kept from the other side until that side ends by itself

    def mute(self) -> None:
        """Keeps everything from the receiver from now on, even the end."""
        self._is_muted = self._keeps_end = True

    def end_stream(self) -> None:
        """Shows the receiver the end of the stream; what is still sent to it is lost."""
        if self._writer is not None and not self._writer.is_closing() and not self._is_muted:
            self._writer.write_eof()
        self._is_muted = True

    # ---- inside

    def _now(self) -> LinkRule:
        return combined(self._book.rules, *self._ends)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(CHUNK_BYTES):
                due_s = loop.time() + self._now().delay_ms / 1000
                passages = self._stream.feed(data)
                cut = next((place for place, passage in enumerate(passages) if self._is_cut_in(passage)), None)
                going_on = b"".join(self._treat(passage) for passage in passages[:cut])
                if cut is not None:
                    self._stream = ZmtpStream()
                    going_on += passages[cut].raw[: len(passages[cut].raw) // 2]
                if going_on:
                    await self._queue.put((due_s, going_on))
                if cut is not None:
                    break
        except ConnectionError:
            self._stream = ZmtpStream()  # a reset is an end too, and what was unfinished is lost with it
        await self._queue.put((loop.time(), self._stream.rest()))
        await self._queue.put(None)

    def _is_cut_in(self, passage: Passage) -> bool:
        return bool(passage.message) and any(cut(*self._ends, passage.message) for cut in self._book.cuts)

    def _treat(self, passage: Passage) -> bytes:
        rules = self._now().frames
        ended = [rule for rule in self._damages if rule not in rules]
        held = [message for rule in ended for message in self._damages.pop(rule).release()]
        before = b"".join(write_message(message) for message in held)
        if not passage.message or not rules:
            return before + passage.raw
        messages: list[Message] = [passage.message]
        for rule in rules:
            damage = self._damages.setdefault(rule, FrameDamage(rule))
            messages = [result for message in messages for result in damage.pass_on(message)]
        return before + b"".join(write_message(message) for message in messages)

    async def _write(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while (item := await self._queue.get()) is not None:
            due_s, data = item
            if (wait_s := due_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            if (bytes_per_s := self._now().bytes_per_s) > 0:
                await asyncio.sleep(len(data) / bytes_per_s)
            await self._book.wait_until_flowing(*self._ends)
            if self._is_muted:
                continue
            writer.write(data)
            await writer.drain()
        await self._book.wait_until_flowing(*self._ends)


class Link:
    """One connection through the proxy: a pipe each way."""

    def __init__(self, book: RuleBook, source: str, destination: str) -> None:
        self.ends = (source, destination)
        self._book = book
        self.there = Pipe(book, source, destination)
        self.back = Pipe(book, destination, source)

    async def carry(
        self,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Carries bytes until one side ends and what it sent before has arrived; then both are closed."""
        ways = [
            asyncio.create_task(self.there.carry(near[0], far[1])),
            asyncio.create_task(self.back.carry(far[0], near[1])),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            # Through a cut network it is not heard that the other side has gone.
            await self._book.wait_until_open(*self.ends)
        finally:
            for way in ways:
                way.cancel()
            # Before anything is awaited: the proxy may end just then, and cancels that too.
            near[1].close()
            far[1].close()
            await asyncio.gather(*ways, return_exceptions=True)


class LinkProxy:
    """Entering starts the proxy in a thread, leaving ends it. All methods may be called from any thread."""

    def __init__(
        self, identify: Identify, host: str = "127.0.0.1", port: int = 0, resolve: Resolve = lambda host: host
    ) -> None:
        self.host = host
        self.port = port
        """It is 0 until the proxy listens, and then the port that the system chose."""
        self._is_listening = False
        self._identify = identify
        self._resolve = resolve
        self._book = RuleBook()
        self._links: set[Link] = set()
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        """These are of all connections, also of those that are closed and still have something to write."""
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._stop = asyncio.Event()

    @property
    def address(self) -> str:
        """`SOCKS_PROXY` is set to it for the nodes."""
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Self:
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="link-proxy", daemon=True)
        self._thread.start()
        if not listening.wait(CLOSE_TIMEOUT_S) or not self._is_listening:
            raise TargetError(f"the proxy cannot listen on {self.address}")
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def add(self, rules: Sequence[LinkRule]) -> None:
        """Adds rules; from now on they hold, also for links that are open."""
        self._call(lambda: self._book.add(rules))

    def remove(self, rules: Sequence[LinkRule]) -> None:
        """Undoes `add`; rules that do not hold are not errors."""
        self._call(lambda: self._book.remove(rules))

    def add_cut(self, cut: Cut) -> None:
        """Ends connections in the middle of messages, from now on. `cut` is called in the proxy's thread."""
        self._call(lambda: self._book.cuts.append(cut))

    def remove_cut(self, cut: Cut) -> None:
        """Undoes `add_cut`; one that is not there is not an error."""
        self._call(lambda: self._book.cuts.remove(cut) if cut in self._book.cuts else None)

    def links(self) -> list[tuple[str, str]]:
        """Returns (the node that opened it, the other end) of every open link."""
        return self._call(lambda: sorted(link.ends for link in self._links))

    def half_close(self, node: str) -> int:
        """Ends every link of a node for its peers and not for itself. Returns how many links that were."""

        def close() -> int:
            hurt = [link for link in self._links if node in link.ends]
            for link in hurt:
                towards_peer, towards_node = (
                    (link.there, link.back) if link.ends[0] == node else (link.back, link.there)
                )
                towards_node.mute()
                towards_peer.end_stream()
            return len(hurt)

        return self._call(close)

    # ---- inside

    def _call(self, work: Callable[[], _Result]) -> _Result:
        async def run() -> _Result:
            return work()

        try:
            return asyncio.run_coroutine_threadsafe(run(), self._loop).result(CALL_TIMEOUT_S)
        except (TimeoutError, RuntimeError) as error:
            raise TargetError(f"the proxy does not answer: {error}") from None

    def _run(self, listening: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(listening))
        finally:
            listening.set()
            self._loop.close()

    async def _serve(self, listening: threading.Event) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve_connection(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        try:
            server = await asyncio.start_server(accept, self.host, self.port)
        except OSError:
            return  # told by `__enter__`
        self.port = server.sockets[0].getsockname()[1]
        self._is_listening = True
        listening.set()
        await self._stop.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in list(self._writers):
            writer.transport.abort()  # a close would wait for a receiver that takes nothing
        await asyncio.sleep(0)

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        # A side that goes away is not an error of the proxy; the other side is told by the close.
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._connect_and_carry(reader, writer)

    async def _connect_and_carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = await read_request(reader, writer)
        peer_host, peer_port = writer.get_extra_info("peername")[:2]
        # Off the loop: asking takes long on a busy machine, and the links that are open must not wait for it.
        host = await asyncio.to_thread(self._resolve, host)
        source = await asyncio.to_thread(self._identify, peer_host, peer_port)
        destination = await asyncio.to_thread(self._identify, host, port)
        # A cut network loses the first packet of a connection too: there is no answer until it is whole again.
        await self._book.wait_until_open(source, destination)
        try:
            far = await asyncio.open_connection(host, port)
            self._writers.add(far[1])
        except OSError:
            writer.write(_UNREACHABLE)
            await writer.drain()
            return
        link = Link(self._book, source, destination)
        self._links.add(link)
        try:
            writer.write(_GRANTED)
            await link.carry((reader, writer), far)
        finally:
            self._links.discard(link)


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int]:
    """Returns host and port that a SOCKS5 client (RFC 1928, no authentication) wants. Raises OSError if it is none."""
    version, num_methods = await reader.readexactly(2)
    if version != 5:
        raise ConnectionError(f"not SOCKS5 but version {version}")
    await reader.readexactly(num_methods)
    writer.write(b"\5\0")
    _, command, _, kind = await reader.readexactly(4)
    if command != 1 or kind not in (1, 3):
        raise ConnectionError(f"SOCKS5 command {command}, address type {kind}: only connect by IPv4 or name is known")
    if kind == 1:
        host = ".".join(str(part) for part in await reader.readexactly(4))
    else:
        (length,) = await reader.readexactly(1)
        host = (await reader.readexactly(length)).decode("ascii", "replace")
    (port,) = _PORT.unpack(await reader.readexactly(2))
    return host, port


def link_proxy(target: Target) -> LinkProxy:
    """Returns the proxy that a target's links go through. Raises TargetError if they go through none."""
    proxy = getattr(target, "proxy", None)
    if not isinstance(proxy, LinkProxy):
        raise TargetError("the links of this mesh go through no proxy: start it with one")
    return proxy
