"""One direction of a link through the proxy: what comes in goes on late, slowly, damaged or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from chaos.proxy.link_rules import FrameRule, LinkRule, Treatment, treatment
from chaos.proxy.zmtp_frames import FrameDamage, Message, Passage, ZmtpStream, write_message

CHUNK_BYTES = 1 << 18
QUEUED_PASSAGES = 256
"""A stalled direction stops reading after so many: then the sender's own buffers fill, as they would on a dead net."""


class RuleBook:
    """The rules that hold now. Belongs to the proxy's loop."""

    def __init__(self) -> None:
        self.rules: list[LinkRule] = []
        self.version = 0
        self.num_damaged = 0
        self._changed = asyncio.Event()

    def add(self, rules: Sequence[LinkRule]) -> None:
        """They hold from now on."""
        self._change([*self.rules, *rules])

    def remove(self, rules: Sequence[LinkRule]) -> None:
        """Each goes once; one that does not hold is no error."""
        left = list(self.rules)
        for rule in rules:
            if rule in left:
                left.remove(rule)
        self._change(left)

    async def wait_until_open(self, one: str, other: str) -> None:
        """Until neither direction between the two is stalled."""
        await self.wait_until_flowing(one, other)
        await self.wait_until_flowing(other, one)

    async def wait_until_flowing(self, source: str, destination: str) -> None:
        """Until that direction is not stalled."""
        while treatment(self.rules, source, destination).is_stalled:
            await self._changed.wait()

    def _change(self, rules: list[LinkRule]) -> None:
        self.rules = rules
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()


class Pipe:
    """Carries bytes of one direction; `carry` ends with the stream."""

    def __init__(self, book: RuleBook, source: str, destination: str) -> None:
        self._book = book
        self._ends = (source, destination)
        self._treatment = Treatment()
        self._version = -1
        self._stream = ZmtpStream()
        self._damages: dict[FrameRule, FrameDamage] = {}
        self._queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(QUEUED_PASSAGES)
        self._writer: asyncio.StreamWriter | None = None
        self._is_muted = False
        self._keeps_end = False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Returns when the stream has ended and all of it has been written."""
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
        """From now on the receiver hears nothing, not even the end."""
        self._is_muted = self._keeps_end = True

    def end_stream(self) -> None:
        """The receiver sees the end of the stream; what is still sent to it is lost."""
        if self._writer is not None and not self._writer.is_closing() and not self._is_muted:
            self._writer.write_eof()
        self._is_muted = True

    # ---- inside

    def _now(self) -> Treatment:
        if self._version != self._book.version:
            self._version = self._book.version
            self._treatment = treatment(self._book.rules, *self._ends)
        return self._treatment

    async def _read(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(CHUNK_BYTES):
                due_s = loop.time() + self._now().delay_ms / 1000
                going_on = b"".join(self._treat(passage) for passage in self._stream.feed(data))
                if going_on:
                    await self._queue.put((due_s, going_on))
        except ConnectionError:
            self._stream = ZmtpStream()  # a reset is an end too, and what was unfinished is lost with it
        await self._queue.put((loop.time(), self._stream.rest()))
        await self._queue.put(None)

    def _treat(self, passage: Passage) -> bytes:
        rules = self._now().frames
        ended = [rule for rule in self._damages if rule not in rules]
        held = [message for rule in ended for message in self._damages.pop(rule).release()]
        before = b"".join(write_message(message) for message in held)
        if not passage.message or not rules:
            return before + passage.raw
        messages: list[Message] = [passage.message]
        for rule in rules:
            damage = self._damages.setdefault(rule, FrameDamage(rule.kind, rule.probability, rule.seed))
            already = damage.num_damaged
            messages = [result for message in messages for result in damage.pass_on(message)]
            self._book.num_damaged += damage.num_damaged - already
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
