"""Settings: each wrong variable is named, with what would be right."""

from __future__ import annotations

import os
import re

import pytest
from pydantic import ValidationError

from common.config import Settings, read_settings
from common.errors import ConfigurationError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("MODEL", "somewhere")


def test_defaults_are_those_of_the_readme() -> None:
    settings = read_settings()
    assert (settings.host, settings.port, settings.pp, settings.experts, settings.copies) == (
        "127.0.0.1",
        8000,
        2,
        2,
        2,
    )
    assert (settings.spares, settings.tp, settings.dtype, str(settings.state_dir)) == (0, 1, "auto", "state")


def test_without_a_model_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv("MODEL") if value is None else monkeypatch.setenv("MODEL", value)
        with pytest.raises(ConfigurationError, match="MODEL is not set"):
            read_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"),
        ("PORT", "http"),
        ("PP", "0"),
        ("STAGES", "-1"),
        ("SPARES", "-1"),
        ("EXPERTS", "0"),
        ("COPIES", "0"),
        ("TP_REDUCE", "sum"),
        ("TP_COLLECTIVES", "mpi"),
        ("TP", "0"),
        ("DTYPE", "float16"),
        ("COMBINE", "sum"),
        ("THREADS", "0"),
        ("THREADS", "1.5"),
        ("THREADS", "all"),
        ("MAX_BATCH_TOKENS", "0"),
        ("KV_CACHE_TOKENS", "63"),
        ("DRAFT_TOKENS", "65"),
        ("CORS_ORIGINS", "chat.example"),
        ("CORS_ORIGINS", "https://chat.example/path"),
        ("CORS_ORIGINS", "https://*.example"),
        ("ALLOWED_HOSTS", "http://chat.example"),
        ("ALLOWED_HOSTS", "chat.example:8000"),
        ("MAX_CONNECTIONS", "0"),
        ("KEEP_ALIVE_S", "0"),
        ("PIPELINE_POLICY", "random"),
        ("LOG_LEVEL", "loud"),
        ("CAPACITY_BYTES", "1GB"),
        ("STEP_DEADLINE_MS", "1"),
        ("HEARTBEAT_INTERVAL_MS", "0"),
        ("HEARTBEAT_INTERVAL_MS", "2000"),
        ("EXPERT_LOSS", "ignore"),
        ("DEGRADE_AFTER_MS", "-1"),
        ("DEVICE", "gpu"),
        ("DEVICE", "cuda:"),
        ("DEVICE", "cuda:one"),
        ("DEVICE_PROCESSES", "0"),
        ("SOCKS_PROXY", "foo"),
        ("SOCKS_PROXY", "socks5://host:1080"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{name}='?{re.escape(value)}'?"):
        read_settings()


@pytest.mark.parametrize("name", ["SERVED_NAME", "STATE_DIR", "MODEL", "CONTROL"])
def test_a_value_that_is_no_utf_8_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, os.fsdecode(b"x\xff"))
    with pytest.raises(ConfigurationError, match=f"{name}=.*: must be UTF-8"):
        read_settings()


def test_all_wrong_variables_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP", "none")
    monkeypatch.setenv("COPIES", "0")
    monkeypatch.delenv("MODEL")
    with pytest.raises(ConfigurationError) as caught:
        read_settings()
    assert all(name in str(caught.value) for name in ("PP='none'", "COPIES='0'", "MODEL is not set"))


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose passes what mesh.env leaves empty."""
    for name in ("PORT", "CONTROL", "DTYPE", "THREADS", "LOG_LEVEL"):
        monkeypatch.setenv(name, "")
    assert read_settings() == Settings(model="somewhere")


def test_stage_processes_are_what_one_pipeline_and_its_spares_need_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP", "3")
    monkeypatch.setenv("SPARES", "1")
    assert read_settings().stage_processes == 4
    monkeypatch.setenv("STAGES", "6")
    assert read_settings().stage_processes == 6


def test_settings_are_left_alone_once_read() -> None:
    with pytest.raises(ValidationError):
        read_settings().pp = 3


def test_experts_can_be_left_out_only_where_stages_weigh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_LOSS", "degrade")
    assert read_settings().expert_loss == "degrade"
    monkeypatch.setenv("COMBINE", "partial")
    with pytest.raises(ConfigurationError, match="EXPERT_LOSS=degrade needs COMBINE=exact"):
        read_settings()


@pytest.mark.parametrize("proxy", ["", "proxy:1080", "10.0.0.1:1080", "[::1]:1080"])
def test_a_proxy_is_a_host_and_a_port(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("SOCKS_PROXY", proxy)
    assert read_settings().socks_proxy == proxy


def test_fewer_stages_than_a_pipeline_needs_are_refused_where_no_other_host_may_bring_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PP", "3")
    monkeypatch.setenv("STAGES", "2")
    with pytest.raises(ConfigurationError, match="STAGES=2 is less than PP=3"):
        read_settings()
    monkeypatch.setenv("CONTROL", "tcp://10.0.0.1:5550")
    assert read_settings().stage_processes == 2


def test_nccl_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP", "2")
    monkeypatch.setenv("TP_COLLECTIVES", "nccl")
    with pytest.raises(ConfigurationError, match="TP_COLLECTIVES=nccl needs DEVICE=cuda"):
        read_settings()
    monkeypatch.setenv("DEVICE", "cuda:1")
    assert (read_settings().tp, read_settings().device) == (2, "cuda:1")


def test_blanks_around_a_value_and_brackets_around_an_address_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DTYPE", " float32"), ("MODEL", "somewhere "), ("HOST", " [::1]\n"), ("PORT", " 7 ")):
        monkeypatch.setenv(name, value)
    assert read_settings() == Settings(model="somewhere", dtype="float32", host="::1", port=7)


def test_what_is_said_of_a_value_is_not_in_a_validators_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DEVICE", "gpu"), ("DTYPE", "half"), ("PORT", "http")):
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigurationError, match=f"{name}='{value}': must be"):
            read_settings()
        monkeypatch.delenv(name)


def test_a_port_that_goes_without_saying_does_not_count_in_an_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Browsers leave it out."""
    monkeypatch.setenv("CORS_ORIGINS", "https://a.example:443,http://b:80,http://c:443,https://[::1]:443")
    assert read_settings().allowed_origins == {"https://a.example", "http://b", "http://c:443", "https://[::1]"}


def test_values_that_are_given_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTS", "3")
    assert read_settings({"EXPERTS": "4", "OTHER": "x"}).experts == 4
    assert read_settings({"EXPERTS": ""}).experts == 3
    with pytest.raises(ConfigurationError, match="EXPERTS='many': must be a valid integer"):
        read_settings({"EXPERTS": "many"})


def test_lists_of_origins_and_names_stand_between_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().allowed_origins == read_settings().allowed_host_names == frozenset()
    monkeypatch.setenv("CORS_ORIGINS", "https://Chat.Example/, http://localhost:3000,null,app://obsidian.md,")
    monkeypatch.setenv("ALLOWED_HOSTS", "chat.example, GPU_1,fe80::1")
    settings = read_settings()
    origins = {"https://chat.example", "http://localhost:3000", "null", "app://obsidian.md"}
    assert settings.allowed_origins == origins
    assert settings.allowed_host_names == {"chat.example", "gpu_1", "fe80::1"}
    monkeypatch.setenv("CORS_ORIGINS", "*")
    assert read_settings().allowed_origins == {"*"}
