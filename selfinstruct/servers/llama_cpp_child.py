"""The child process that holds llama.cpp. ``llama_cpp.LlamaCppServer`` starts it by path; it imports nothing of ours.

Standard input: one line of JSON (``Settings`` below), then nothing until the parent closes it or dies, which ends this
process. Standard output: one line ``{"url": ...}`` once the model is loaded and the port is open. Standard error: what
llama.cpp has to say about errors. The settings travel by pipe because arguments are seen by every user of the machine.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any, TypedDict


class Settings(TypedDict):
    """What the parent asks for; ``context`` is in tokens and shared by all slots."""

    model: str
    alias: str
    slots: int
    context: int
    threads: int
    api_key: str


def parameters(xllamacpp: Any, settings: Settings) -> Any:
    """Translate to xllamacpp: loopback only, nothing but inference, no origin of a web page allowed."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {settings["alias"]}
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["context"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # the system picks a free one
    params.api_keys = [settings["api_key"]] if settings["api_key"] else []
    # The default echoes any Origin together with Allow-Credentials, so that every web page could read the answers.
    params.cors_origins = ""
    params.cors_origins_explicit = True
    params.cors_credentials = False
    params.ui = False
    params.endpoint_slots = False  # shows other clients' prompts
    params.offline = True
    params.warmup = False
    params.cache_ram_mib = 0  # by default prompts of idle slots are kept in up to 8 GiB of memory
    params.cache_idle_slots = False
    params.verbosity = 1  # errors only: they are the reason in our ServerError
    return params


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent: answers in flight are still wanted
    settings: Settings = json.loads(sys.stdin.readline())
    xllamacpp: Any = importlib.import_module("xllamacpp")  # by name: it has no type stubs, and only the child has it
    try:
        server = xllamacpp.Server(parameters(xllamacpp, settings))
    except RuntimeError as fault:
        sys.exit(f"xllamacpp: {fault}")
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()
    os._exit(0)  # the destructor would wait for the batch that is being computed: 20 s measured under load


if __name__ == "__main__":
    main()
