"""The front over a disk that hangs: it answers, it says why it takes nothing, and what runs goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.journal import STUCK_AFTER_S
from tests.support.front.disks import HangingDisk
from tests.support.front.fake_engine import Pause
from tests.support.front.journalling_front import COMPLETIONS, EOS, RESUMABLE, Server, run, wait_for_tokens


def test_while_the_disk_hangs_the_front_answers_and_running_requests_go_on(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    async def main() -> None:
        disk = HangingDisk()
        server = Server(
            tokenizer, tmp_path / "j", [*tokenizer.encode("ab"), Pause(), *tokenizer.encode("c"), EOS], disk
        )
        running = server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await disk.answer_until(asyncio.create_task(wait_for_tokens(server, 2)))
        waiting = server.start("POST", COMPLETIONS, prompt="hi")
        await asyncio.sleep(0.01)
        disk.busy_s = STUCK_AFTER_S + 2
        server.journal.tick()
        refused = await waiting.answer()
        assert (refused.status, refused.json()["error"]["code"]) == (503, "journal_unavailable")
        assert "the disk under STATE_DIR has not answered for 3 s" in refused.json()["error"]["message"]
        assert (await server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi")).status == 503
        assert (await server.ask("GET", "/health")).status == 200
        ready = await server.ask("GET", "/ready")
        assert (ready.status, ready.json()["ready"]) == (503, False)
        assert "has not answered" in ready.json()["detail"]
        server.engine.gate.set()
        answer = (await running.answer()).json()
        assert answer["choices"][0]["text"] == "abc"
        assert answer["usage"]["moemesh"]["durable"] is False
        deleted = await server.ask("DELETE", "/v1/requests/mine")
        assert deleted.status == 503, "it does not wait for a disk that hangs, either"
        disk.answer()
        server.journal.tick()
        disk.answer()
        assert (await server.ask("GET", "/ready")).status == 200
        server.journal.close()
        disk.answer()

    run(main())


def test_what_was_marked_is_durable_once_it_is_written(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        disk = HangingDisk()
        server = Server(tokenizer, tmp_path / "j", [*tokenizer.encode("ab"), EOS], disk)
        running = server.start("POST", COMPLETIONS, RESUMABLE, prompt="hi")
        await disk.answer_until(asyncio.create_task(server.engine.wait_asked(1)))
        disk.busy_s = STUCK_AFTER_S + 1
        server.journal.tick()
        assert (await running.answer()).json()["usage"]["moemesh"]["durable"] is False
        assert (await server.state()).json()["reply"]["usage"]["moemesh"]["durable"] is False
        disk.answer()
        server.journal.tick()
        disk.answer()
        assert (await server.state()).json()["reply"]["usage"]["moemesh"]["durable"] is True
        server.journal.close()
        disk.answer()

    run(main())
