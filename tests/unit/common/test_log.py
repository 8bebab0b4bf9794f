"""One JSON line an event."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from common.errors import CapacityError, ConfigurationError
from common.log import configure_log
from common.node.process import run_process


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_an_event_is_a_line_of_json_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = configure_log("stage", "info")
    log.info("node_joined", node="stage-1", bytes=3)
    log.debug("not_asked_for")
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert {"event": "node_joined", "service": "stage", "level": "info", "node": "stage-1", "bytes": 3}.items() <= (
        event.items()
    )
    assert event["timestamp"].endswith("Z")


def test_an_exception_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("stage", "error").error("broke", exc_info=ValueError("why"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: why" in json.loads(line)["exception"]


@pytest.mark.parametrize("level", ["", "loud", "INFO"])
def test_a_level_that_is_wrong_does_not_keep_the_settings_from_saying_so(level: str) -> None:
    configure_log("router", level).info("starts")

    def work(log: structlog.stdlib.BoundLogger) -> None:
        raise ConfigurationError(f"LOG_LEVEL={level}")

    assert run_process("router", level, work) == 1


def test_what_stops_a_process_is_its_last_sentence_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def work(log: structlog.stdlib.BoundLogger) -> None:
        raise CapacityError("3 bytes are missing")

    assert run_process("expert", "info", work) == 1
    logged, sentence = capsys.readouterr().err.splitlines()
    assert json.loads(logged)["code"] == "capacity_exceeded"
    assert sentence == "moemesh expert: 3 bytes are missing"


def test_a_process_that_ends_in_order_exits_with_0() -> None:
    assert run_process("expert", "info", lambda log: None) == 0


def test_a_level_with_blanks_around_it_is_that_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("router", " error\t").info("starts")
    assert capsys.readouterr().err == ""
