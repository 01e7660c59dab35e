"""Blocks sockets beyond loopback in a Python process: tests must not reach, or pay, anybody."""

import sys


def _guard(event, arguments):
    if event != "socket.connect":
        return
    address = arguments[1]
    if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
        raise PermissionError(f"a test tried to connect to {address[0]!r}")


sys.addaudithook(_guard)
