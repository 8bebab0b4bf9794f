"""Settings by environment: the same names for `make run`, compose and a process started by hand.

Read once in a process's `__main__`, checked there, then passed on; nothing else reads the environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.errors import ConfigurationError


class Settings(BaseSettings):
    """Every setting of a mesh and of its processes. Field names are the environment's names in lower case."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    # ---- what is served, and where
    model: str = Field(min_length=1, description="checkpoint directory or hub name")
    served_name: str = Field(default="", description="name in the API; default: the directory's name")
    host: str = "127.0.0.1"
    published_host: str = Field(
        default="", description="address of the host at which a container's HTTP port is published; default: HOST"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free port")
    state_dir: Path = Path("state")

    # ---- the shape of the mesh
    pp: int = Field(default=2, ge=1, description="layer ranges of a pipeline")
    stages: int = Field(default=0, ge=0, description="stage processes to start; 0: PP + SPARES")
    spares: int = Field(default=0, ge=0, description="stage processes held back")
    experts: int = Field(default=2, ge=1, description="expert processes to start")
    copies: int = Field(default=2, ge=1, description="safety copies of each expert")
    expert_slices: int = Field(default=1, ge=1, description="cuts of each expert along its width")
    tp: int = Field(default=1, ge=1, description="tensor-parallel ranks of a stage: processes on its host")

    # ---- where stages and experts compute
    device: str = Field(default="cpu", description="cpu, cuda, cuda:N; auto: cuda where there is one")
    device_processes: int = Field(default=1, ge=1, description="processes of this mesh that share a GPU")

    # ---- numbers
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    combine: Literal["exact", "partial"] = "exact"
    call_rings: Literal["auto", "off"] = Field(
        default="auto",
        description="native code makes expert calls: through shared memory within a host, else over tcp; off: all go "
        "as messages",
    )
    rings_folder: str = Field(
        default="",
        description="where stages and experts of one host find each other for shared memory, over tcp too; default: "
        "the folder of their sockets, if there is one",
    )
    threads: str = Field(
        default="auto",
        description="compute threads of a process, and of each rank of a stage; auto: every core that it may use",
    )
    tp_reduce: Literal["ordered", "fast"] = Field(
        default="ordered", description="fast: ranks add partial sums, and bits depend on TP"
    )
    tp_collectives: Literal["auto", "board", "gloo", "nccl"] = Field(
        default="auto",
        description="how ranks exchange parts: shared memory, or torch.distributed; auto: nccl where each rank has a "
        "GPU of its own, else board",
    )

    # ---- the scheduler's budgets
    max_batch_tokens: int = Field(default=512, ge=1)
    max_batch_sequences: int = Field(default=64, ge=1)
    prefill_chunk_tokens: int = Field(default=256, ge=1)
    max_waiting: int = Field(default=512, ge=1, description="requests queued before the door says 429")
    micro_batches: int = Field(default=0, ge=0, description="in flight per pipeline; 0: as many as stages, or one more")
    micro_batch_sequences: int = Field(default=32, ge=1, description="fewer decoding sequences are not split up")
    kv_cache_tokens: int = Field(default=65536, ge=64, description="KV cache of a pipeline, in tokens")
    max_context_tokens: int = Field(default=0, ge=0, description="0: what the model allows")
    pipeline_policy: Literal["least_in_flight", "weighted"] = "least_in_flight"
    draft_tokens: int = Field(
        default=15, ge=0, le=64, description="tokens that a decoding sequence may guess ahead in a step; 0: none"
    )
    prefix_cache: Literal["on", "off"] = Field(
        default="on", description="on: a prompt that begins like an earlier one is computed from where they part"
    )
    session_cache_mib: int = Field(
        default=256, ge=0, description="host memory of each stage for cached KV blocks that had to make room; 0: none"
    )

    # ---- what happens when a stage is lost
    recovery: Literal["auto", "mirror", "replay", "move"] = Field(
        default="auto", description="how requests of a lost stage go on; auto: by mirror, else replay or move"
    )

    # ---- one process
    control: str = Field(default="", description="router's control endpoint; default: ipc in the state folder")
    advertise_host: str = Field(default="", description="host name for a node's tcp sockets; default: its own address")
    socks_proxy: str = Field(default="", description="HOST:PORT of a SOCKS5 proxy for all tcp links; default: none")
    host_label: str = Field(default="", description="copies go to different labels; default: one per machine")
    capacity_bytes: int = Field(default=0, ge=0, description="memory a node offers; 0: 80% of what is free")
    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    max_connections: int = Field(default=1024, ge=1, description="HTTP connections at a time; fewer if files are few")
    keep_alive_s: float = Field(default=75, gt=0, le=86_400, description="pause between two requests of a connection")
    cors_origins: str = Field(default="", description="allowed origins, comma-separated; *: all")
    allowed_hosts: str = Field(default="", description="further Host names accepted by a router on loopback; *: all")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # ---- the journal: what outlives the router and its clients' connections
    journal: Literal["process", "durable", "off"] = Field(
        default="process", description="process: survives kill -9; durable: also power loss, each commit waits"
    )
    resume_grace_ms: int = Field(default=60_000, ge=0, description="how long a resumable request runs without a client")
    journal_retention_s: int = Field(default=600, ge=0, description="how long finished resumable requests are kept")
    journal_max_requests: int = Field(
        default=10_000, ge=1, description="resumable and idempotent requests that are kept before the door says 429"
    )
    journal_max_bytes: int = Field(
        default=256 << 20, ge=1024, description="bytes of them, and of plain ones under way, before the door says 429"
    )

    # ---- deadlines
    step_deadline_ms: int = Field(default=60_000, ge=100, description="a step that takes longer has failed")
    outage_deadline_ms: int = Field(default=60_000, ge=100, description="longest wait without an open pipeline")
    call_deadline_ms: int = Field(default=20_000, ge=50, description="an expert call that takes longer has failed")
    heartbeat_interval_ms: int = Field(
        default=250, ge=20, le=1000, description="how often nodes report; /ready counts on a report within 1.6 s"
    )
    expert_loss: Literal["wait", "degrade"] = Field(default="wait", description="when no copy of an expert is left")
    degrade_after_ms: int = Field(default=500, ge=0, description="how long EXPERT_LOSS=degrade waits for a copy")

    @field_validator("*", mode="before")
    @classmethod
    def _strip(cls, value: object) -> object:
        """Blanks around a value are never intended: numbers may have them, and so may the rest. What is not UTF-8
        could neither be sent nor be part of the name of a socket."""
        if not isinstance(value, str):
            return value
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("must be UTF-8") from None
        return value.strip()

    @field_validator("host", "published_host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        """Reads an IPv6 address as it stands in URLs, too."""
        return host[1:-1] if re.fullmatch(r"\[[^\[\]]*\]", host) else host

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if re.fullmatch(r"cpu|cuda(:\d+)?|auto", device) is None:
            raise ValueError("must be cpu, cuda, cuda:N (the GPU's number) or auto")
        return device

    @field_validator("threads")
    @classmethod
    def _check_threads(cls, threads: str) -> str:
        if re.fullmatch(r"0*[1-9]\d{0,3}|auto", threads, re.ASCII) is None:
            raise ValueError("must be a number, 1 or more, or auto")
        return threads

    @field_validator("socks_proxy")
    @classmethod
    def _check_proxy(cls, proxy: str) -> str:
        if proxy and re.fullmatch(r"([^\s:/\[\]]+|\[[0-9a-fA-F:.]+\]):\d{1,5}", proxy) is None:
            raise ValueError("must be HOST:PORT of a SOCKS5 proxy")
        return proxy

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str) -> str:
        for origin in _listed(origins):
            # Browsers send pages of apps and extensions with schemes of their own.
            if re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@*]+", origin) is None:
                raise ValueError(
                    f"{origin!r} is not an origin, which is a scheme, a host and perhaps a port: https://chat.example "
                    "or http://localhost:3000; * allows all"
                )
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: str) -> str:
        for host in _listed(hosts):
            if re.fullmatch(r"\*|[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|[0-9a-f:.]*:[0-9a-f:.]*", host) is None or (
                re.fullmatch(r"[^:]+:\d+", host) is not None
            ):
                raise ValueError(
                    f"{host!r} is not a host name; write it without scheme and port, as in chat.example; * allows all"
                )
        return hosts

    @property
    def allowed_origins(self) -> frozenset[str]:
        """Returns CORS_ORIGINS as a set, written as browsers do: without a port that goes without saying."""
        return frozenset(re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", o) for o in _listed(self.cors_origins))

    @property
    def allowed_host_names(self) -> frozenset[str]:
        """Returns ALLOWED_HOSTS as a set."""
        return frozenset(_listed(self.allowed_hosts))

    @property
    def library_threads(self) -> int:
        """Returns on how many threads libraries compute, whose calls wait for all of them: one with THREADS=auto."""
        return 1 if self.threads == "auto" else int(self.threads)

    @property
    def stage_processes(self) -> int:
        """Returns how many stage processes a supervisor starts."""
        return self.stages or self.pp + self.spares


def setting_names() -> frozenset[str]:
    """Returns the names of all environment variables that mean something here."""
    return frozenset({name.upper() for name in Settings.model_fields} | {"MOEMESH_CACHE", "MOEMESH_URL"})


def _listed(text: str) -> list[str]:
    """Returns what stands between commas, in lower case; an address may end in a slash."""
    return [entry.strip().lower().removesuffix("/") for entry in text.split(",") if entry.strip()]


def read_settings(values: Mapping[str, str] | None = None) -> Settings:
    """Returns the settings of this process; `values`, by their environment's names, win over its environment.

    Raises ConfigurationError that names each wrong variable and what would be right.
    """
    given: dict[str, Any] = {name.lower(): value for name, value in (values or {}).items() if value}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        problems = "; ".join(
            f"{'_'.join(str(part) for part in problem['loc']).upper()}={problem['input']!r}: "
            + problem["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
            if problem["type"] != "missing"
            else f"{str(problem['loc'][0]).upper()} is not set"
            for problem in error.errors()
        )
        raise ConfigurationError(f"wrong settings: {problems}") from None
    if settings.expert_loss == "degrade" and settings.combine != "exact":
        raise ConfigurationError("EXPERT_LOSS=degrade needs COMBINE=exact: partial sums cannot leave an expert out")
    if settings.stages and settings.stages < settings.pp and not settings.control.startswith("tcp://"):
        raise ConfigurationError(
            f"STAGES={settings.stages} is less than PP={settings.pp}: a pipeline needs a stage for each layer range; "
            "leave STAGES out, or set it to PP + SPARES at least"
        )
    if settings.tp_collectives == "nccl" and settings.device == "cpu":
        raise ConfigurationError("TP_COLLECTIVES=nccl needs DEVICE=cuda: NCCL joins GPUs; use board or gloo on CPUs")
    return settings
