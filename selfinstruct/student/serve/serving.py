"""Bringing a served model up and down: sizes, the engine, the socket, the signals."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace

from aiohttp import web

from selfinstruct.backends.base import is_loopback_host
from selfinstruct.errors import EnvironmentFault, UsageError
from selfinstruct.student.infer.engine import Engine, EngineConfig, columns_for
from selfinstruct.student.infer.generation import on_gpu_unquantised, prepare
from selfinstruct.student.infer.live import LiveEngine
from selfinstruct.student.infer.sizing import slots_for
from selfinstruct.student.infer.slots import unsupported
from selfinstruct.student.models.weights import Loaded, made_for
from selfinstruct.student.serve.serve import Service, application

_CONTEXT = 4096
_CHUNK = 4  # steps between two looks: the delay of a stream against the waits for the GPU
_MOST_SLOTS = 256


def open_service(
    loaded: Loaded,
    *,
    name: str = "student",
    slots: int | None = None,
    context: int | None = None,
    compile_layers: bool = False,
    token: str = "",
    log: Callable[[str], None] = lambda _line: None,
) -> Service:
    """Start an engine for a model. ``slots`` None: as many sequences of ``context`` tokens as the memory holds.

    Raises UsageError for a model that cannot run on slots, fewer than one of them, or a context beyond what it was
    made for.
    """
    check_slots(slots)
    config = loaded.model.config
    reason = unsupported(config)
    if reason:
        raise UsageError(f"{loaded.source.name} cannot be served: {reason}", hint="serve it with vLLM or llama.cpp")
    most = made_for(config)
    if context is not None and context > most:
        raise UsageError(f"--context {context} is more than the model was made for", hint=f"at most {most}")
    context = context or min(_CONTEXT, most)
    compiled = prepare(loaded.model, compile_layers=compile_layers, log=log)
    graphs = on_gpu_unquantised(loaded.model)
    shape = EngineConfig(1, context, context - 1, _CHUNK, graphs=graphs, compiled=compiled)
    wanted = _MOST_SLOTS if loaded.model.device.type == "cuda" else 16
    fitting = slots_for(loaded.model, columns_for(shape), wanted, limit=slots)
    chosen = replace(shape, slots=fitting)
    log(f"{fitting} requests at a time of up to {context} tokens{', CUDA graphs' if chosen.graphs else ''}")
    live = LiveEngine(Engine(loaded.model, chosen, loaded.end_ids))
    return Service(live, loaded.tokenizer, loaded.template, name, context, token)


def check_slots(slots: int | None) -> None:
    """UsageError unless there is room for a request, or the memory decides."""
    if slots is not None and slots < 1:
        raise UsageError(f"--batch {slots} is out of range", hint="give a whole number from 1")


def serve(service: Service, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. ``on_ready`` gets the base URL. EnvironmentFault when the port is taken."""
    asyncio.run(_serve(service, host, port, on_ready))


async def _serve(service: Service, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    app = application(service, any_host=not is_loopback_host(host))
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise EnvironmentFault(
                f"cannot listen on {host}:{port} ({error.strerror or error})", hint="choose another --port"
            ) from error
        taken = runner.addresses[0]
        shown = f"[{taken[0]}]" if ":" in str(taken[0]) else taken[0]
        on_ready(f"http://{shown}:{taken[1]}/v1")
        await ended.wait()
    finally:
        await runner.cleanup()
