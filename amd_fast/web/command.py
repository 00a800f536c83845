"""``amd-fast serve``."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
from contextlib import suppress
from pathlib import Path

from rich.markup import escape

from amd_fast.errors import ConfigError
from amd_fast.progress import console


def serve_command(
    *,
    model: str | None = None,
    gallery: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_upload_mb: float = 50.0,
    token: bool = False,
    keep: str | None = None,
) -> None:
    """Serve a web page to enrol actions and recognise clips, from files or a webcam.

    Every browser has its own actions, in memory. Uploaded files are deleted as soon as they are read.

    Args:
        model: Run folder of `amd-fast train`, or a .safetensors file of a model; without one, simple descriptors are compared.
        gallery: Folder with actions enrolled before, which everybody begins with; it is not changed.
        host: Address to listen at; 127.0.0.1 for this computer alone, 0.0.0.0 for all of its networks.
        port: Port to listen at; 0 for any that is free.
        max_upload_mb: Largest clip taken, in 10^6 bytes.
        token: Let in only who has the random token that is part of the printed address.
        keep: Folder in which to keep what each browser has shown, as galleries for --gallery with the same model (not the
            videos); by default nothing is kept.
    """
    try:
        import uvicorn

        from amd_fast.web.app import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("amd_fast"):
            raise
        raise ConfigError(f"the web page needs the package {error.name}, which is not installed: pip install 'amd_fast[web]'") from error
    from amd_fast.classifier import FewShotClassifier
    from amd_fast.training.checkpoint import load_model
    from amd_fast.web.guard import own_hosts
    from amd_fast.web.sessions import Limits

    if max_upload_mb <= 0:
        raise ConfigError(f"max_upload_mb={max_upload_mb}; give the largest clip in 10^6 bytes, above 0")
    listening = _listen(host, port)
    with listening:
        loaded = None if model is None else load_model(model)
        classifier = FewShotClassifier(loaded) if gallery is None else FewShotClassifier.load(gallery, model=loaded)
        secret = secrets.token_urlsafe(24) if token else ""
        limits = Limits(upload_bytes=round(max_upload_mb * 1e6))
        kept = None if keep is None else Path(keep)
        app = create_app(classifier, limits=limits, hosts=own_hosts(host), token=secret, keep=kept)
        _greet(host, listening.getsockname()[1], secret)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False))
        with suppress(KeyboardInterrupt):  # uvicorn ends its work, then passes the signal on
            server.run(sockets=[listening])
    console.print("stopped")


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound before anything slow happens.

    Raises:
        ConfigError: the port is taken or not allowed, or there is no such address.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port={port}; ports are 1 to 65535, and 0 for any that is free")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use already; choose another with --port, or --port 0 for any that is free") from error
        raise ConfigError(f"cannot listen at {host}, port {port} ({error.strerror or error}); see --host and --port") from error


def _greet(host: str, port: int, token: str) -> None:
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{'localhost' if _everywhere(host) else shown}:{port}/" + (f"?token={token}" if token else "")
    console.print(f"serving at [bold]{escape(address)}[/bold]  (Ctrl-C stops)", soft_wrap=True, highlight=False)
    if not _this_computer(host):
        who = "whoever has the token" if token else "everybody"
        console.print(
            f"[yellow]warning:[/yellow] {who} who reaches this computer at {escape(host)} can use the page, unencrypted"
            f"{'' if token else '; --token asks for a token'}. Browsers allow the camera on https and on this computer only.",
            soft_wrap=True,
            highlight=False,
        )


def _everywhere(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def _this_computer(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
