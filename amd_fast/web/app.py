"""The web page's server: receives clips, has them read and recognised, and keeps browsers apart."""

from __future__ import annotations

import asyncio
import copy
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from amd_fast.classifier import Answer, FewShotClassifier
from amd_fast.classifier.spaces import ModelSpace, space_of
from amd_fast.errors import AmdFastError, ConfigError
from amd_fast.web.guard import Guard
from amd_fast.web.reading import ClipReading, Reading, UploadReading
from amd_fast.web.sessions import NOTHING_TO_CHOOSE, UNKNOWN, FullError, Limits, Session, Sessions, action_name

COOKIE = "amd_fast_session"
STATIC = Path(__file__).parent / "static"
_SWEEP_SECONDS = 60.0
T = TypeVar("T")


class _RefusedError(Exception):
    """A request that is answered with a status and a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


@dataclass
class Service:
    """What the routes share.

    Attributes:
        sessions: by browser.
        limits: of everything.
        reading: decodes uploads in processes.
        folder: private, for uploads until they are read.
        thread: one thread for the model; work for it waits there and not in the event loop.
        keeps: whether sessions are kept in a folder.
        free: number of further uploads taken at the moment.
    """

    sessions: Sessions
    limits: Limits
    reading: ClipReading
    folder: Path
    thread: ThreadPoolExecutor
    keeps: bool
    free: int

    async def on_model(self, work: Callable[[], T]) -> T:
        """Runs what needs a classifier in the thread for it."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    async def read_upload(self, request: Request) -> Reading:
        """Receives the body of a request and has it decoded; nothing of the file is left.

        Raises:
            _RefusedError: it is too large, too slow, or there is too much to do.
            DecodeError: it is not a clip that can be read.
        """
        most = self.limits.upload_bytes
        if int(request.headers.get("content-length") or 0) > most:
            raise _too_large(most)
        if self.free <= 0:
            raise _RefusedError(503, "the server is busy with other clips; try again in a moment")
        self.free -= 1
        path = self.folder / secrets.token_hex(16)
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                await _receive(request, path, most)
            # Not the default executor, whose few threads other requests need for files.
            return await anyio.to_thread.run_sync(self.reading.read, str(path), limiter=anyio.CapacityLimiter(1))
        except TimeoutError as error:
            raise _RefusedError(408, "the clip took too long to arrive; give a smaller one") from error
        finally:
            self.free += 1
            path.unlink(missing_ok=True)


async def _receive(request: Request, path: Path, most: int) -> None:
    received = 0
    async with await anyio.open_file(path, "xb") as file:
        async for chunk in request.stream():
            received += len(chunk)
            if received > most:
                raise _too_large(most)
            await file.write(chunk)
    if not received:
        raise _RefusedError(422, "the file is empty (0 bytes); give a video")


def _too_large(most: int) -> _RefusedError:
    return _RefusedError(413, f"the file is larger than {most / 1e6:g} MB; give a shorter or smaller clip")


def create_app(
    classifier: FewShotClassifier | None = None,
    *,
    limits: Limits | None = None,
    hosts: frozenset[str] | None = None,
    token: str = "",
    keep: Path | None = None,
    processes: int = 2,
) -> FastAPI:
    """The application, for any ASGI server (one process of it: sessions are in memory).

    Args:
        classifier: what everybody begins with: one that was not fitted yet (its ``model`` decides), or one with actions. Not changed.
        limits: see :class:`~amd_fast.web.sessions.Limits`.
        hosts: host names it answers to; None for any.
        token: that every browser has to show, see :class:`~amd_fast.web.guard.Guard`; empty for none.
        keep: folder in which every browser's actions are kept as a gallery (not their videos); None to keep nothing.
        processes: that decode clips.

    Raises:
        ConfigError: the model reads neither pictures nor motion, or an action of the classifier cannot be shown.
    """
    limits = limits or Limits()
    first, work = _prepared(classifier or FewShotClassifier())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        reading = ClipReading(work, processes, limits.read_seconds)
        threading.Thread(target=reading.warm_up, name="warm-up", daemon=True).start()
        thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        with tempfile.TemporaryDirectory(prefix="amd-fast-") as folder:
            sessions = Sessions(first, limits, keep)
            app.state.service = Service(sessions, limits, reading, Path(folder), thread, keep is not None, limits.uploads)
            sweeping = asyncio.create_task(_sweep(sessions))
            try:
                yield
            finally:
                sweeping.cancel()
                thread.shutdown(wait=False, cancel_futures=True)
                reading.close()

    app = FastAPI(title="amd_fast", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts, token=token)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _add_routes(app)
    _add_errors(app)
    return app


def _prepared(classifier: FewShotClassifier) -> tuple[FewShotClassifier, UploadReading]:
    """The classifier with the model loaded and clips of no action allowed for, and how clips are read for it."""
    first = copy.copy(classifier).set_params(unknown=UNKNOWN, unreadable="raise", progress=False, workers=1)
    fitted = hasattr(first, "space_")
    space = first.space_ if fitted else space_of(first.model, "clips", first.crops)
    if isinstance(space, ModelSpace):
        first.set_params(model=space.model)  # loaded once, whatever a session starts anew with
    modalities = tuple(name for name in space.modalities if name in ("rgb", "flow")) if space.kind != "vectors" else ()
    if not modalities:
        raise ConfigError("the page takes videos, but this classifier reads neither rgb nor flow of them; give another model or gallery")
    wrong = [label for label in (first.classes_.tolist() if fitted else []) if not isinstance(label, str) or label == UNKNOWN]
    if wrong:
        raise ConfigError(f"actions need names other than {UNKNOWN!r}, got {wrong[0]!r}; enroll the clips again under such names")
    return first, UploadReading(modalities, **space.decoding)


async def _sweep(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        sessions.forget_idle()


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def _session(request: Request) -> Session:
    return _service(request).sessions.get(request.cookies.get(COOKIE))


async def _summary(request: Request, session: Session) -> dict[str, Any]:
    here = _service(request)
    found = await here.on_model(session.summary)
    return {**found, "upload_bytes": here.limits.upload_bytes, "idle_minutes": here.limits.idle_seconds / 60, "kept": here.keeps}


async def _changed(request: Request, key: str, session: Session, status: int) -> JSONResponse:
    """The actions after a change, with the cookie by which the browser finds its session again."""
    response = JSONResponse(await _summary(request, session), status)
    response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response


def _add_routes(app: FastAPI) -> None:
    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/actions")
    async def actions(request: Request) -> dict[str, Any]:
        return await _summary(request, _session(request))

    @app.post("/api/clips")
    async def add_clip(request: Request, action: str = "", name: str = "") -> JSONResponse:
        here, label = _service(request), action_name(action)
        here.sessions.check_room(_session(request))
        reading = await here.read_upload(request)
        # Begun only now: whoever uploads nothing of use takes nobody's place.
        key, session = here.sessions.begin(request.cookies.get(COOKIE))
        await here.on_model(lambda: session.enrol(reading, label, name))
        return await _changed(request, key, session, 201)

    @app.get("/api/clips/{number}")
    async def picture(request: Request, number: int) -> Response:
        for clip in _session(request).clips:
            if clip.number == number:
                return Response(clip.thumbnail, media_type="image/jpeg")
        raise _RefusedError(404, "there is no such clip (any more)")

    @app.delete("/api/actions")
    async def remove_action(request: Request, action: str) -> JSONResponse:
        key, session = _service(request).sessions.begin(request.cookies.get(COOKIE))  # actions of the gallery can be removed too
        await _service(request).on_model(lambda: session.forget(action))
        return await _changed(request, key, session, 200)

    @app.post("/api/answers")
    async def ask(request: Request, false_unknown: Annotated[float, Query(ge=0, le=1)] = 0.1) -> dict[str, Any]:
        here, session = _service(request), _session(request)
        if len(session.shots()) < 2:  # before the clip is sent
            raise _RefusedError(422, NOTHING_TO_CHOOSE)
        reading = await here.read_upload(request)
        answer: Answer = await here.on_model(lambda: session.ask(reading, false_unknown))
        return answer.to_dict()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(_RefusedError)
    async def refused(request: Request, error: _RefusedError) -> JSONResponse:
        return JSONResponse({"error": error.text}, error.status)

    @app.exception_handler(AmdFastError)
    async def wrong(request: Request, error: AmdFastError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 503 if isinstance(error, FullError) else 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "something went wrong in the server, which its log explains; try again"}, 500)
