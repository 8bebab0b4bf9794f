"""The router process put together: mesh thread and HTTP server around it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from common.config import Settings
from common.errors import ConfigurationError, FencedError
from common.ids import NodeId
from common.messages import Welcome
from common.node.control_link import NodeAddresses, find_addresses
from common.node.process import StopFlag, descriptor_limit, open_transport
from common.wire.codec import ITEM_BYTES
from common.wire.tcp_resends import resend_soon
from common.wire.transport import Transport
from services.router.control.experts.expert_roles import ExpertRoles
from services.router.control.membership import Membership, patience_for
from services.router.control.sizes import MeshShape
from services.router.control.stage_roles import StageRoles
from services.router.front.http.answers import ConnectionLimits
from services.router.front.http.cross_origin import OriginPolicy, is_loopback_name
from services.router.front.http.server import FrontConfig, FrontServer
from services.router.front.metrics import ConnectionMetrics
from services.router.front.registry import RequestRegistry
from services.router.front.routes import create_app
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.disk_thread import DiskThread, Housekeeping, finish_within
from services.router.journal.journal import Journal, open_journal
from services.router.journal.records import JournalledRequest
from services.router.journal.set_aside import Attention, SetAside, attention_path, without_culprits
from services.router.journal.state_folder import StateFolder, open_state_folder
from services.router.mesh.engine import MeshEngine, TokenMailbox
from services.router.mesh.loop import LoopHooks, MeshLoop, MeshRoles, MeshTerms
from services.router.mesh.metrics import MeshCollector
from services.router.mesh.placer import ProcessPlacer
from services.router.mesh.sockets import MeshClient
from services.router.mesh.steps import Sink, StepFlow
from services.router.scheduling.drafts.prompt_lookup import PromptLookup
from services.router.scheduling.drafts.source import DraftSource
from services.router.scheduling.drafts.step_times import step_shape
from services.router.scheduling.drafts.worthwhile import WorthwhileDrafter
from services.router.scheduling.request import Attend
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.served_model import Model, read_model

log = structlog.get_logger(__name__)

BLOCK_TOKENS = 32
"""Tokens of a KV block; stages compute attention in tiles of that size, so it is part of what decides the bits."""
TERM_SHIFT = 32
"""Numbers of steps, sequences and generations have the term above this many bits: they ascend from router to router."""
CLOSE_WITHIN_S = 2.0
"""How long the end of the router waits for the disk under STATE_DIR, and for its links."""
RESTORE_WITHIN_S = 0.5
"""How long a restarted router puts requests in line before it serves; those that are not by then follow."""
SWITCH_INTERVAL_S = 0.0005
"""How long the HTTP thread may keep the interpreter from the mesh thread (Python's default, 5 ms, is a decode step)."""
GARBAGE_THRESHOLDS = (50_000, 20, 20)
"""When Python looks for garbage in cycles, of which a token makes none: by its own 700 objects it would take a tenth of
the time of streams."""
CLIENT_AWAY_MS = 900_000
"""How long a client may acknowledge nothing before its connection is given up: about as long as Linux has it."""
RELIEF_INTERVAL_S = 5.0
RELIEF_GROWTH_BYTES = 32 << 20
"""It must have grown by this much since memory was given back last: less is not worth the while."""


def http_url(host: str, port: int) -> str:
    """Returns where a listening address is asked; an IPv6 address stands in brackets (RFC 3986)."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(settings: Settings) -> None:
    """Runs the router until SIGTERM or SIGINT. Raises MoemeshError when it cannot start."""
    # The server takes these signals while it runs, and raises them again once it has ended: it does no harm then.
    should_stop = StopFlag()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    router = _assemble(settings)
    try:
        await router.run(should_stop)
    finally:
        if not router.storage.close(router.links):
            log.warning("ended_without_disk", detail=f"the disk under STATE_DIR={settings.state_dir} does not answer")
    if router.failure is not None:
        raise router.failure
    router.storage.attention.close()
    log.info("stopped")


def _assemble(settings: Settings) -> _Router:
    model = read_model(settings)
    tokenizer = TextTokenizer.from_directory(model.directory)
    _log_checkpoint(model, tokenizer)
    storage = _open_storage(settings, model)
    listener = _listen(settings)
    links = _open_links(settings, storage)
    mailbox = TokenMailbox(asyncio.get_running_loop())
    placer = ProcessPlacer(links.client.wake, log)
    mesh = _mesh_loop(settings, model, storage, links, mailbox, placer)
    engine = MeshEngine(
        mesh,
        mailbox,
        _context_tokens(settings, model),
        time.monotonic,
        max_waiting=settings.max_waiting,
        takes_over=storage.state.term > 1,
    )
    registry = _registry(mesh, storage.journal)
    front = _front_settings(settings, model, listener)
    app = create_app(engine, tokenizer, front, registry, journal=storage.journal)
    requests: RequestRegistry = app.state.requests
    requests.refuse_set_aside = storage.set_aside.refuse
    requests.attend_restored = storage.attention.restoring
    server = _server(settings, app, lambda: engine.readiness().ready, registry)
    host, port = listener.getsockname()[:2]
    storage.state.publish_url(f"{http_url(host, port)}\n")
    log.info("listening", host=host, port=port, term=storage.state.term, model=model.served_name, dtype=model.dtype)
    return _Router(storage, links, placer, mesh, requests, server, listener)


@dataclass(frozen=True, slots=True)
class _Links:
    """What the mesh thread speaks to nodes by."""

    transport: Transport
    addresses: NodeAddresses
    client: MeshClient

    def close(self) -> None:
        """Closes the sockets, and removes their files with them."""
        self.client.close()
        self.transport.close()


@dataclass(frozen=True, slots=True)
class _Storage:
    """What the router has in its state folder, and the threads that work there."""

    state: StateFolder
    disk: DiskThread
    journal: Journal | None
    journalled: list[JournalledRequest]
    """What a router before this one has left, but for requests that were set aside."""
    set_aside: SetAside
    attention: Attention

    def close(self, links: _Links) -> bool:
        """Writes what is left, then closes the links, whose socket files are on a disk too. Returns False if it is not
        done in time."""
        if self.journal is not None:
            self.journal.close()
        self.disk.submit(self.state.close)
        return self.disk.close(CLOSE_WITHIN_S) and finish_within(links.close, CLOSE_WITHIN_S)


@dataclass(slots=True)
class _Router:
    """Runs the mesh and the HTTP server. If the mesh breaks, the process must end: a router that answers HTTP and no
    request is of no use."""

    storage: _Storage
    links: _Links
    placer: ProcessPlacer
    mesh: MeshLoop
    requests: RequestRegistry
    server: FrontServer
    listener: socket.socket
    failure: BaseException | None = None
    """What the mesh broke by."""

    async def run(self, should_stop: StopFlag) -> None:
        """Goes on with what a router before this one has left, and serves until it is to end."""
        mesh_thread = threading.Thread(target=self._run_mesh, name="mesh", daemon=True)
        self.placer.start()
        number_restored = len(self.storage.journalled)
        self.requests.restore(self.storage.journalled)
        self.storage.journalled.clear()  # each is in memory for as long as it is kept, and no longer
        going_on = asyncio.create_task(self.requests.go_on())
        relief = asyncio.create_task(MemoryRelief().run())
        try:
            # A client that connects meanwhile waits in the listener's queue, and finds its request.
            await asyncio.wait({going_on}, timeout=RESTORE_WITHIN_S)
            # Only now: stages that are back hand their cache to requests that are in line.
            mesh_thread.start()
            if number_restored:
                log.info("requests_restored", number=number_restored, are_all_in_line=going_on.done())
            if not should_stop():
                await self.server.serve(sockets=[self.listener])
        finally:
            self.mesh.stop()
            if mesh_thread.is_alive():
                mesh_thread.join(timeout=5)  # it ends with its turn, but the router does not wait for ever
            self.placer.close()
            for task in (going_on, relief):
                task.cancel()
            await asyncio.gather(going_on, relief, return_exceptions=True)
            await self.requests.close()

    def _run_mesh(self) -> None:
        try:
            self.mesh.run()
        except BaseException as error:
            if isinstance(error, FencedError):
                log.error("router_fenced", reason=error.message)
            else:
                log.critical("mesh_thread_broke", exc_info=error)
                self.storage.disk.submit(self.storage.attention.note_break)
            self.failure = error
            self.server.should_exit = True


def _open_storage(settings: Settings, model: Model) -> _Storage:
    state = open_state_folder(settings.state_dir)
    disk = DiskThread()
    journal, journalled = _open_journal(settings, model, state, disk)
    journalled, set_aside = without_culprits(state.path, journalled, partial(_forget, journal))
    # Only once what a router before this one left there was read.
    attention = Attention(attention_path(state.path), state.path / "ending.json")
    disk.start()
    return _Storage(state, disk, journal, journalled, set_aside, attention)


def _open_journal(
    settings: Settings, model: Model, state: StateFolder, disk: DiskThread
) -> tuple[Journal | None, list[JournalledRequest]]:
    if settings.journal == "off":
        return None, []
    return open_journal(
        state.path / "journal.sqlite3",
        f"{model.fingerprint} {model.dtype}",
        state.check_term,
        disk,
        is_synchronous=settings.journal == "durable",
        retention_s=settings.journal_retention_s,
    )


def _forget(journal: Journal | None, reply_id: str) -> None:
    assert journal is not None, "it is the journal's request"
    journal.end(reply_id, is_kept=False)


def _open_links(settings: Settings, storage: _Storage) -> _Links:
    transport = open_transport(settings, log)
    addresses = find_addresses(settings, NodeId("router"))
    client = MeshClient(transport, addresses, storage.state.term, log, storage.disk.submit)
    return _Links(transport, addresses, client)


def _log_checkpoint(model: Model, tokenizer: TextTokenizer) -> None:
    if model.config.dtype == "float16" and model.dtype == "bfloat16":
        log.warning("dtype_narrowed", detail="float16 weights are computed in bfloat16; DTYPE=float32 loses nothing")
    for remark in model.remarks:
        log.warning("checkpoint_remark", detail=remark)
    if tokenizer.defaults.not_applied:
        log.warning("defaults_not_applied", file="generation_config.json", keys=tokenizer.defaults.not_applied)


def _registry(mesh: MeshLoop, journal: Journal | None) -> CollectorRegistry:
    registry = CollectorRegistry()
    if journal is not None:
        registry.register(journal)
    registry.register(MeshCollector(lambda: mesh.status))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _front_settings(settings: Settings, model: Model, listener: socket.socket) -> FrontSettings:
    return FrontSettings(
        served_name=model.served_name,
        max_body_bytes=settings.max_body_bytes,
        system_fingerprint=f"{model.fingerprint[:12]}-{model.dtype}",
        resume_grace_s=settings.resume_grace_ms / 1000,
        retention_s=settings.journal_retention_s,
        max_kept_requests=settings.journal_max_requests,
        max_kept_bytes=settings.journal_max_bytes,
        origins=_origins(settings, listener),
    )


def _server(
    settings: Settings, app: FastAPI, may_finish: Callable[[], bool], registry: CollectorRegistry
) -> FrontServer:
    requests: RequestRegistry = app.state.requests
    limits = ConnectionLimits(
        keep_alive_s=settings.keep_alive_s,
        # Clients get a third: the rest is for nodes (five for each), the journal, and what is being refused or closed.
        max_connections=max(1, min(settings.max_connections, descriptor_limit() // 3)),
    )
    config = FrontConfig(app, limits, ConnectionMetrics(registry), app.state.refuse_connection)
    return FrontServer(config, requests.release, requests.give_up, may_finish)


def _context_tokens(settings: Settings, model: Model) -> int:
    """Returns what one sequence may hold: the model's context, or what the KV cache of a pipeline holds. The log is
    told of a context that was asked for and cannot be had; /v1/models shows what there is."""
    context_tokens = min(model.context_tokens, settings.kv_cache_tokens // BLOCK_TOKENS * BLOCK_TOKENS)
    wished = settings.max_context_tokens or model.config.context_tokens
    if wished <= context_tokens:
        return context_tokens
    limit = f"the model is made for {model.config.context_tokens} tokens"
    if context_tokens < model.context_tokens:
        limit = f"KV_CACHE_TOKENS={settings.kv_cache_tokens} holds {context_tokens} in whole blocks"
    asked = f"MAX_CONTEXT_TOKENS={wished}" if settings.max_context_tokens else f"the model's context of {wished} tokens"
    detail = f"{asked} cannot be had, since {limit}: a request may have {context_tokens}"
    log.warning("context_is_smaller", asked=wished, context_tokens=context_tokens, detail=detail)
    return context_tokens


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named. Without it a small write waits until the client has
    # acknowledged the one before: 40 ms where it delays that, for a body behind its head, or a token behind another.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # A token that is lost on its way to the client is sent again as soon as one between processes; by itself the kernel
    # would then give the client up after seconds, and not after a quarter of an hour.
    if resend_soon(listener.fileno()):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CLIENT_AWAY_MS)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"HOST={settings.host} PORT={settings.port} cannot be listened on: {error}") from None
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def _origins(settings: Settings, listener: socket.socket) -> OriginPolicy:
    # In a container it listens on all addresses, of which those outside are not reached but by the published one.
    reached_at = settings.published_host.strip("[]") or listener.getsockname()[0]
    is_loopback = is_loopback_name(reached_at)
    return OriginPolicy(settings.allowed_origins, settings.allowed_host_names, is_loopback)


def _mesh_loop(
    settings: Settings, model: Model, storage: _Storage, links: _Links, mailbox: TokenMailbox, placer: ProcessPlacer
) -> MeshLoop:
    client, term, journal = links.client, storage.state.term, storage.journal
    scheduler = _scheduler(settings, model, term, storage.attention)
    step_deadline_s = settings.step_deadline_ms / 1000
    flow = StepFlow(
        client,
        scheduler,
        step_deadline_s,
        model.config.vocab_size,
        mailbox if journal is None else _journal_first(journal, mailbox),
        log,
        *([journal.note_placement] if journal is not None else []),
    )
    return MeshLoop(
        MeshTerms(model.config, model.fingerprint, _welcome(settings, model, links)),
        client,
        flow,
        MeshRoles(
            _stage_roles(settings, model, links.addresses, client.results.endpoints, term),
            ExpertRoles(model.config, _shape(settings, model), settings.experts),
            placer,
        ),
        Membership(patience_for(step_deadline_s, settings.heartbeat_interval_ms / 1000)),
        log,
        LoopHooks(
            housekeeping=_housekeeping(storage, links.transport),
            outgrow=partial(storage.state.outgrow, on_disk=storage.disk.submit),
        ),
    )


def _journal_first(journal: Journal, sink: Sink) -> Sink:
    """Returns a sink that hands on what the journal has written, and nothing any more once that raises FencedError."""
    return lambda outcomes: journal.append(outcomes, partial(sink, outcomes))


def _housekeeping(storage: _Storage, transport: Transport) -> Housekeeping:
    def look_after_own() -> None:
        transport.look_after_files(time.monotonic())
        storage.attention.look_after()

    tick_journal = (lambda: None) if storage.journal is None else storage.journal.tick
    return Housekeeping(storage.disk, storage.state.look_after, look_after_own, tick_journal)


def _shape(settings: Settings, model: Model) -> MeshShape:
    return MeshShape(
        pp=settings.pp,
        spares=settings.spares,
        copies=settings.copies,
        num_slices=settings.expert_slices,
        item_bytes=ITEM_BYTES[model.dtype],
        block_tokens=BLOCK_TOKENS,
        kv_cache_tokens=settings.kv_cache_tokens,
        session_cache_bytes=settings.session_cache_mib << 20 if settings.prefix_cache == "on" else 0,
    )


def draft_source() -> DraftSource:
    """Returns what guesses at tokens."""
    return PromptLookup()


def _scheduler(settings: Settings, model: Model, term: int, attend: Attend) -> Scheduler:
    scheduling = SchedulerSettings(
        block_tokens=BLOCK_TOKENS,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_sequences=settings.max_batch_sequences,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        max_waiting=settings.max_waiting,
        min_decode_share=settings.micro_batch_sequences,
        micro_batches_per_pipeline=settings.micro_batches or None,
        max_outage_s=settings.outage_deadline_ms / 1000,
        # A step that takes its whole time, and then a pipeline that is gone for as long as one may be.
        max_stalled_s=(settings.step_deadline_ms + settings.outage_deadline_ms) / 1000,
        pipeline_policy=settings.pipeline_policy,
        caches_prefixes=settings.prefix_cache == "on",
    )
    drafter = None
    if settings.draft_tokens:
        drafter = WorthwhileDrafter(draft_source(), step_shape(model.config), settings.draft_tokens)
    return Scheduler(scheduling, first_number=term << TERM_SHIFT, attend=attend, drafter=drafter)


def _welcome(settings: Settings, model: Model, links: _Links) -> Welcome:
    return Welcome(
        heartbeat_interval_ms=settings.heartbeat_interval_ms,
        dtype=model.dtype,
        combine=settings.combine,
        block_tokens=BLOCK_TOKENS,
        num_slices=settings.expert_slices,
        call_deadline_ms=settings.call_deadline_ms,
        expert_loss=settings.expert_loss,
        degrade_after_ms=settings.degrade_after_ms,
        pulse=links.addresses.advertised(links.client.pulses.endpoints),
        pulse_ipc_token=links.addresses.folder_token,
        caches_prefixes=settings.prefix_cache == "on",
    )


def _stage_roles(
    settings: Settings, model: Model, addresses: NodeAddresses, results: tuple[str, ...], term: int
) -> StageRoles:
    """Returns the roles of stages; `results` is where the router listens for the results of steps."""
    return StageRoles(
        model.config,
        _shape(settings, model),
        addresses.advertised(results),
        addresses.folder_token,
        recovery=settings.recovery,
        adopts=term > 1,
        first_generation=term << TERM_SHIFT,
    )


def resident_bytes() -> int:
    """Returns the memory that this process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def trim_heap() -> None:
    """Gives free pages to the system, where the C library can do that."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return
    trim.argtypes = [ctypes.c_size_t]
    trim(0)


class MemoryRelief:
    """Gives memory that a flood of requests has left behind back to the system, each time that it has grown by
    RELIEF_GROWTH_BYTES.

    What is freed stays with the C library, in pages that are empty but for a few live blocks, and in pools that each
    thread which ever tokenized has of its own: after 64 prompts of 200 kB a router of 71 MB kept 350 MB, of which
    nothing was in use. glibc gives such pages back when it is asked (`malloc_trim`), and only then. That takes 30 ms
    for 250 MB, in a thread, and keeps no other thread from memory for longer than usual.
    """

    def __init__(
        self,
        give_back: Callable[[], None] = trim_heap,
        resident_bytes: Callable[[], int] = resident_bytes,
    ) -> None:
        self._give_back = give_back
        self._resident_bytes = resident_bytes
        self._least_bytes = resident_bytes()
        """What it had when memory was last given back, or less."""

    def look(self) -> None:
        """Gives memory back if it is worth it. It may run in any thread, but in one at a time, and take some ten
        milliseconds."""
        resident = self._resident_bytes()
        if resident - self._least_bytes > RELIEF_GROWTH_BYTES:
            self._give_back()
            self._least_bytes = self._resident_bytes()
        else:
            self._least_bytes = min(self._least_bytes, resident)

    async def run(self, interval_s: float = RELIEF_INTERVAL_S) -> None:
        """Looks now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.look)
