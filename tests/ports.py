"""Ports for the servers of tests."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """A port that nobody takes between this look and its use: outgoing connections, and servers that ask for any, get higher ones."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
