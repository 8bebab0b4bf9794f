"""What was deleted stays so, also if the router is killed as soon as it has said that."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.disk_thread import DiskThread
from tests.support.front.fake_engine import Pause, Step
from tests.support.front.journal_files import compact, is_durable, limit_pages, reopened
from tests.support.front.journalling_front import (
    COMPLETIONS,
    EOS,
    RESUMABLE,
    Server,
    run,
    wait_for_end,
    wait_for_tokens,
)
from tests.support.front.journals import token


def left_by_a_kill(path: Path) -> list[str]:
    """Ids of the requests that a router finds which starts on what is in the files now."""
    copy = path.parent / "copy"
    copy.mkdir()
    for part in path.parent.glob(f"{path.name}*"):
        shutil.copy(part, copy)
    return [request.accepted.reply_id for request in reopened(copy / path.name)]


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize("script", [[5, Pause()], [5, EOS]])
def test_deleted_request_is_gone_from_the_journal_when_the_client_is_told(
    tokenizer: TextTokenizer, tmp_path: Path, script: list[Step], is_compacted: bool
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", script)
        server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await wait_for_tokens(server, 1)
        if EOS in script:
            await wait_for_end(server)
        if is_compacted:
            compact(server.journal)
        assert (await server.ask("DELETE", "/v1/requests/mine")).json()["deleted"] is True
        assert left_by_a_kill(tmp_path / "j") == []
        compact(server.journal)
        shutil.rmtree(tmp_path / "copy")
        assert left_by_a_kill(tmp_path / "j") == []
        assert (await server.state()).status == 404
        server.journal.close()

    run(main())


def test_nobody_waits_for_the_disk_but_who_deletes(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        disk = DiskThread()
        disk.start()
        server = Server(tokenizer, tmp_path / "j", [5, Pause()], disk)
        server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await wait_for_tokens(server, 1)
        assert await asyncio.wrap_future(server.journal.flush())
        store, has_room = server.journal._writer._store, threading.Event()
        append = store.append_steps

        def slow(steps: list[bytes]) -> None:
            assert has_room.wait(5)
            append(steps)

        store.append_steps = slow  # type: ignore[assignment, method-assign]
        deleting = asyncio.create_task(server.ask("DELETE", "/v1/requests/mine"))
        for _ in range(20):
            assert (await server.ask("GET", "/health")).status == 200
        assert not deleting.done()
        has_room.set()
        assert (await deleting).status == 200
        server.journal.close()

    run(main())


def test_a_deletion_that_the_disk_does_not_take_is_an_error_and_may_be_asked_again(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        server = Server(tokenizer, tmp_path / "j", [5, Pause()])
        server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await wait_for_tokens(server, 1)
        limit_pages(server.journal, 1)
        while is_durable(server.journal):
            server.journal.append([(server.engine.asked[0].request_id, token(5)) for _ in range(200)])
        answer = await server.ask("DELETE", "/v1/requests/mine")
        assert (answer.status, answer.json()["error"]["code"]) == (503, "journal_unavailable")
        assert server.engine.cancelled == server.engine.asked, "it does not run on"
        limit_pages(server.journal, 1 << 20)
        assert (await server.ask("DELETE", "/v1/requests/mine")).status == 200
        assert left_by_a_kill(tmp_path / "j") == []
        server.journal.close()

    run(main())
