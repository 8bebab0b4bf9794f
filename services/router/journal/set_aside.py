"""Whose turn it is, where a killed router leaves it; and requests that were set aside, kept in the state folder.

Whose turn it is, in the mesh thread and where requests are planned again, stands in a file of shared memory: writing
to it costs no system call and waits for no disk, and it is there after the process was killed, in whatever way. A
router that breaks writes to `STATE_DIR/ending.json` whose turn it was in the mesh thread. `STATE_DIR/ends.json` counts
over starts. `STATE_DIR/set-aside/` has one file per request that will not be resumed: a client that asks for it is
told, and people find there what it takes to see why.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import structlog
from pydantic import TypeAdapter

from common.atomic_write import write_whole
from common.errors import SetAsideError
from services.router.journal.culprits import Ending, Record, judge
from services.router.journal.records import JournalledRequest

log = structlog.get_logger(__name__)

_SLOT_BYTES = 512
_HANDLED, _RESTORED = 0, _SLOT_BYTES
"""Where the slot of the mesh thread begins, and that of the event loop, which plans requests again."""
_SIZE = 2 * _SLOT_BYTES
_NAME = 8
"""The offset of the name in a slot. Byte 0 of the slot has its length, and is written last."""
_SHARED_MEMORY = Path("/dev/shm")
_MAX_NAME_BYTES = 250
_RECORD = TypeAdapter(Record)
MAX_KEPT = 100
"""How many requests are kept aside; the oldest go first."""


def attention_path(state_dir: Path) -> Path:
    """Returns a path in shared memory where there is any: a disk that hangs must not stop its writers."""
    name = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:16]
    return _SHARED_MEMORY / f"moemesh-{os.getuid()}-{name}" if _SHARED_MEMORY.is_dir() else state_dir / "attention"


class Attention:
    """Call it with the id of the request whose turn it is in the mesh thread; the empty string means no request's."""

    def __init__(self, path: Path, ending: Path) -> None:
        """What a router before this one has left must be read first.

        `ending`: where a router that breaks writes down whose turn it was.
        """
        self._path = path
        self._ending = ending
        self._is_lost = False
        self._memory, self._memory_is_a_file = mmap.mmap(-1, _SIZE), False
        self.look_after()

    def __call__(self, name: str) -> None:
        """Belongs to the mesh thread."""
        self._note(_HANDLED, name)

    def restoring(self, name: str) -> None:
        """Notes which request is being planned again, if any. Belongs to the event loop."""
        self._note(_RESTORED, name)

    def _note(self, slot: int, name: str) -> None:
        memory = self._memory
        memory[slot] = 0
        if name:
            data = name.encode(errors="replace")[:_MAX_NAME_BYTES]
            memory[slot + _NAME : slot + _NAME + len(data)] = data
            memory[slot] = len(data)

    def note_break(self) -> None:
        """Writes down that the router ends by an error of its own."""
        try:
            write_whole(self._ending, json.dumps({"handled": _name_in(self._memory[:], _HANDLED)}))
        except OSError as error:
            log.error("crash_note_not_written", path=str(self._ending), reason=str(error))

    def look_after(self) -> None:
        """Makes the file again if it was removed; without one, only a router that breaks leaves a word."""
        if self._is_lost or (self._memory_is_a_file and self._path.exists()):
            return
        try:
            memory = self._map()
            memory[:] = self._memory[:]  # the event loop may be in the middle of a request
            self._memory, self._memory_is_a_file = memory, True
        except OSError as error:
            self._is_lost = True
            log.warning("culprit_file_lost", path=str(self._path), reason=str(error))

    def close(self) -> None:
        """Removes the file: the router ends, and not by a request."""
        if self._memory_is_a_file:
            self._path.unlink(missing_ok=True)

    def _map(self) -> mmap.mmap:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(f"{self._path} belongs to another user")
            os.ftruncate(descriptor, _SIZE)
            os.pwrite(descriptor, bytes(_SIZE), 0)  # a page that cannot be had is an error here, and later a signal
            return mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)


def read_ending(path: Path, ending: Path) -> Ending:
    """Returns what the router before this one has left; nothing, if it left nothing that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Ending(str(json.loads(ending.read_text())["handled"]), is_broken=True)
    try:  # it did not break: it was killed, or ended in order
        data = path.read_bytes()
    except OSError:
        return Ending()
    return Ending(_name_in(data, _HANDLED), _name_in(data, _RESTORED)) if len(data) == _SIZE else Ending()


def _name_in(data: bytes, slot: int) -> str:
    return data[slot + _NAME : slot + _NAME + data[slot]].decode(errors="replace")


class SetAside:
    """The folder of requests that were set aside. It is read once, at the start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reasons: dict[tuple[str, str], str] = {}
        """(tenant, any of its names) -> a sentence for its client."""
        for path in self._paths():
            try:
                kept = json.loads(path.read_text())
                self._note(kept["tenant"], kept["names"], kept["message"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("set_aside_unreadable", path=str(path), reason=str(error))

    def refuse(self, tenant: str, name: str) -> None:
        """Raises SetAsideError if this tenant's request of that id, own id or idempotency key was set aside."""
        message = self._reasons.get((tenant, name))
        if message is not None:
            raise SetAsideError(message)

    def has(self, request: JournalledRequest) -> bool:
        """Says whether the request is kept here."""
        return (request.accepted.tenant, request.accepted.reply_id) in self._reasons

    def keep(self, request: JournalledRequest, reason: str) -> None:
        """Answers for the request from now on, and writes it down. Raises OSError: then the next router does not
        know."""
        accepted = request.accepted
        message = f"request {accepted.reply_id}: {reason}; its state is kept on disk, and it will not be resumed"
        names = [name for name in (accepted.reply_id, accepted.client_request_id, accepted.idempotency_key) if name]
        body, tokens = accepted.body.decode(errors="replace"), _token_ids(request)
        kept = asdict(accepted) | {"body": body, "names": names, "message": message, "choices": tokens}
        # A name of ours: an id may hold what a file's name may not.
        name = hashlib.sha256(accepted.reply_id.encode()).hexdigest()[:32]
        self._note(accepted.tenant, names, message)
        self._folder.mkdir(mode=0o700, exist_ok=True)  # prompts stand in it in clear
        write_whole(self._folder / f"{name}.json", json.dumps(kept, indent=1))
        log.error("request_set_aside", request=accepted.reply_id, reason=reason, folder=str(self._folder))
        for path in self._paths()[:-MAX_KEPT]:
            path.unlink(missing_ok=True)

    def _note(self, tenant: str, names: Sequence[str], message: str) -> None:
        self._reasons.update({(tenant, name): message for name in names})

    def _paths(self) -> list[Path]:
        """Oldest first. What is neither a file nor a link to one is not ours."""
        files = [path for path in self._folder.glob("*.json") if path.is_file()]
        return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def without_culprits(
    state_dir: Path,
    journalled: Sequence[JournalledRequest],
    forget: Callable[[str], None],
) -> tuple[list[JournalledRequest], SetAside]:
    """Returns the requests that will be resumed, or may be asked for. Those that end the router are set aside, and
    forgotten by the journal through `forget`, which gets their reply ids.

    What the disk does not take is said, and judged again at the next start.
    """
    ending = state_dir / "ending.json"
    set_aside = SetAside(state_dir / "set-aside")
    ends = state_dir / "ends.json"
    requests = {request.accepted.reply_id: request for request in journalled}
    for reply_id in [reply_id for reply_id, request in requests.items() if set_aside.has(request)]:
        forget(reply_id)  # a router was killed before its journal had forgotten it
        del requests[reply_id]
    last_ending = read_ending(attention_path(state_dir), ending)
    judgement = judge(_read_record(ends), last_ending, list(requests.values()))
    culprits = [(requests.pop(reply_id), reason) for reply_id, reason in judgement.set_aside.items()]
    try:
        for request, reason in culprits:
            set_aside.keep(request, reason)
            forget(request.accepted.reply_id)
        # After what was set aside: a router that is killed in between judges the same again.
        write_whole(ends, _RECORD.dump_json(judgement.record).decode())
        ending.unlink(missing_ok=True)
    except OSError as error:
        log.error("crash_counts_not_written", folder=str(state_dir), reason=str(error))
    return list(requests.values()), set_aside


def _token_ids(request: JournalledRequest) -> list[list[int]]:
    try:
        return [[token.token_id for token in choice.tokens] for choice in request.choices]
    except ValueError:
        return []


def _read_record(path: Path) -> Record:
    """Reads the record; nothing of it where it is not what was written: at worst three more ends are counted."""
    try:
        return _RECORD.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return Record()
