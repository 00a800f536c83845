"""Remote files through the cache, against a real S3 server on the loopback: what is read, what is kept, what happens when things fail."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from amd_fast import storage
from amd_fast.errors import CheckpointError, ConfigError, DataError, DecodeError, ImplementationError
from amd_fast.files import write_atomically, written_folder
from amd_fast.storage import cache, remote

ODD_NAMES = (
    "plain.mp4",
    "a b/c.mp4",
    "x # & ; ( ! [ @ ].mp4",
    "50%20 + ? * {}.npy",
    "täglich/日本語.mp4",
    "a::b=c.avi",
    "no_suffix",
    "'\"`~^$.mp4",
)


def put(bucket: Any, name: str, content: bytes = b"content") -> str:
    bucket.put_object(Key=name, Body=content)
    return f"s3://{bucket.name}/{name}"


def get(bucket: Any, name: str) -> bytes:
    return bucket.Object(name).get()["Body"].read()


def copies() -> dict[str, bytes]:
    """What the cache holds, by file name."""
    return {path.name: path.read_bytes() for path in (storage.cache_folder() / "objects").glob("*/*")}


@contextmanager
def requests(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Requests that reach the server in the block, as "GET /bucket/key": its own log, whichever process they come from."""
    seen: list[str] = []
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        caplog.clear()
        yield seen
        lines = [re.sub(r"\x1b\[\d+m", "", record.getMessage()) for record in caplog.records if record.name == "werkzeug"]
        seen += [line.split('"')[1].rsplit(" ", 1)[0] for line in lines if '"' in line]


def own_server(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Points everything that is opened from now on at another address."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3fs.S3FileSystem.clear_instance_cache()


# --------------------------------------------------------------------------------------------------------------------- names


def test_names_of_uris_and_paths() -> None:
    assert [storage.is_uri(name) for name in ("s3://b/k", "memory://x", "gs://b", "/a/b", "a://", "c:\\x", "a b://c", "")] == [
        *(True, True, True, False, False, False, False, False)
    ]
    assert not storage.is_remote("file:///a/b") and storage.plain("file:///a/b") == "/a/b" and storage.plain("s3://b/k") == "s3://b/k"
    assert storage.join("s3://b/", "x y", "z.csv") == "s3://b/x y/z.csv"
    assert storage.join("s3://b/x", "/local/y") == "/local/y" and storage.join("/a", "s3://b/k") == "s3://b/k"
    assert storage.join(Path("/a"), "b", "c") == "/a/b/c"
    assert [storage.parent(name) for name in ("s3://b/x/y.csv", "s3://b/x/", "s3://b", "/a/b", "c")] == [
        *("s3://b/x", "s3://b", "s3://b", "/a", "")
    ]
    assert storage.base_name("s3://b/x/y.csv") == "y.csv" and storage.base_name("s3://b/x/") == "x"


def test_local_paths_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "a # b"
    path.write_bytes(b"here")
    assert storage.local(path) == path and storage.local(f"file://{path}") == path and storage.local("none") == Path("none")
    assert storage.read_bytes(path) == b"here" and storage.exists(path) and not storage.exists(tmp_path / "none")
    assert storage.working_folder(tmp_path) == tmp_path


# --------------------------------------------------------------------------------------------------------------------- objects


def test_objects_of_any_name_are_read_written_and_listed(bucket: Any, tmp_path: Path) -> None:
    for number, name in enumerate(ODD_NAMES):
        content = f"{number} {name}".encode()
        uri = f"s3://{bucket.name}/in/{name}"
        storage.write_bytes(uri, content)
        assert get(bucket, f"in/{name}") == content
        assert storage.local(uri).read_bytes() == content == storage.read_bytes(uri)
        assert storage.local(uri).suffix == (os.path.splitext(name)[1])
        (tmp_path / "file").write_bytes(content * 2)
        storage.upload(tmp_path / "file", uri)
        assert get(bucket, f"in/{name}") == content * 2
    assert storage.list_below(f"s3://{bucket.name}/in") == sorted(ODD_NAMES, key=lambda name: ("/" in name, name))
    storage.remove(f"s3://{bucket.name}/in/{ODD_NAMES[2]}")
    storage.remove(f"s3://{bucket.name}/in/{ODD_NAMES[2]}")
    assert not storage.exists(f"s3://{bucket.name}/in/{ODD_NAMES[2]}") and storage.exists(f"s3://{bucket.name}/in")


def test_a_listing_goes_like_a_walk(bucket: Any) -> None:
    for name in ("b/z/1", "b/a", "b/z.txt", "b/.hidden", "a", "c/.git/x", "b/", "c/d/e"):
        put(bucket, name)
    assert storage.list_below(f"s3://{bucket.name}") == ["a", "b/a", "b/z.txt", "b/z/1", "c/d/e"]
    with pytest.raises(DataError, match="nothing below it"):
        storage.list_below(f"s3://{bucket.name}/none")


def test_other_kinds_of_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_CACHE", str(tmp_path / "cache"))
    storage.write_bytes("memory://folder/a.bin", b"old")
    assert storage.local("memory://folder/a.bin").read_bytes() == b"old"
    storage.write_bytes("memory://folder/a.bin", b"new")
    assert storage.local("memory://folder/a.bin").read_bytes() == b"new"
    assert storage.list_below("memory://folder") == ["a.bin"]


def test_a_store_that_renames_never_shows_half_a_file(tmp_path: Path) -> None:
    steps: list[tuple[str, list[str]]] = []

    class Disk(LocalFileSystem):
        protocol = "disk"

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            super().pipe_file(path, value, mode, **kwargs)
            steps.append((path, sorted(os.listdir(tmp_path))))

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("disk://")

    fsspec.register_implementation("disk", Disk, clobber=True)
    storage.write_bytes(f"disk://{tmp_path}/a.bin", b"whole")
    assert (tmp_path / "a.bin").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a.bin"]
    assert len(steps) == 1 and "a.bin" not in steps[0][1] and steps[0][0] != f"{tmp_path}/a.bin"


# --------------------------------------------------------------------------------------------------------------------- cache


def test_a_changed_object_is_fetched_again_an_unchanged_one_is_not(bucket: Any, caplog: pytest.LogCaptureFixture) -> None:
    uri = put(bucket, "clip.mp4", b"first")
    with requests(caplog) as seen:
        assert storage.local(uri).read_bytes() == b"first" == storage.local(uri).read_bytes()
    assert sum(line.startswith("GET") for line in seen) == 1
    put(bucket, "clip.mp4", b"secon")  # of the same size
    assert storage.local(uri).read_bytes() == b"secon"
    assert list(copies().values()) == [b"secon"]  # the older version has gone


def test_many_threads_fetch_once(bucket: Any, caplog: pytest.LogCaptureFixture) -> None:
    content = random.Random(0).randbytes(3_000_000)
    uri = put(bucket, "big.bin", content)
    with requests(caplog) as seen, ThreadPoolExecutor(12) as pool:
        paths = set(pool.map(storage.local, [uri] * 12))
    assert len(paths) == 1 and paths.pop().read_bytes() == content
    assert sum(line.startswith("GET") for line in seen) == 1


def _read(uri: str, start: Any, sizes: Any) -> None:
    start.wait(30)
    sizes.put(len(storage.local(uri).read_bytes()))


def test_two_processes_at_once_fetch_once(bucket: Any, caplog: pytest.LogCaptureFixture) -> None:
    uri = put(bucket, "big.bin", random.Random(0).randbytes(5_000_000))
    context = multiprocessing.get_context("fork")
    start, sizes = context.Barrier(2), context.Queue()
    with requests(caplog) as seen:
        processes = [context.Process(target=_read, args=(uri, start, sizes)) for _ in range(2)]
        for process in processes:
            process.start()
        assert [sizes.get(timeout=60) for _ in processes] == [5_000_000] * 2
        for process in processes:
            process.join()
    assert sum(line.startswith("GET") for line in seen) == 1


def test_the_least_recently_used_goes_first(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_CACHE_GB", "3.5e-6")
    uris = {name: put(bucket, name, name.encode() * 1000) for name in "abcd"}
    for name in "abca":
        storage.local(uris[name])
        time.sleep(0.01)
    storage.local(uris["d"])
    assert {content[:1] for content in copies().values()} == {b"a", b"c", b"d"}


def test_what_is_in_use_stays(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_CACHE_GB", "1e-6")
    used, others = put(bucket, "used", b"u" * 900), [put(bucket, f"{i}", b"o" * 900) for i in range(3)]
    with storage.lease(used) as first, storage.lease(used) as second:
        for uri in others:
            storage.local(uri)
            assert first == second and first.read_bytes() == b"u" * 900
            assert len(copies()) == 2
    storage.local(others[0])
    assert not first.exists() and len(copies()) == 1


def _hold(uri: str, ready: Any) -> None:
    held = storage.lease(uri)
    ready.set()
    time.sleep(60)
    held.close()


def test_what_another_process_uses_stays_until_it_dies(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_CACHE_GB", "1e-6")
    used, other = put(bucket, "used", b"u" * 900), put(bucket, "other", b"o" * 900)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(used, ready))
    process.start()
    assert ready.wait(30)
    storage.local(other)
    assert sorted(content[:1] for content in copies().values()) == [b"o", b"u"]
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    put(bucket, "other", b"x" * 900)
    storage.local(other)
    assert [content[:1] for content in copies().values()] == [b"x"]


def test_the_bound_holds_and_every_read_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AMD_FAST_CACHE_GB", "1e-5")
    draw = random.Random(1)
    sizes = [draw.randrange(1, 4000) for _ in range(12)]
    contents = {f"memory://bound/{i}": draw.randbytes(size) for i, size in enumerate(sizes)}
    for uri, content in contents.items():
        storage.write_bytes(uri, content)
    for _ in range(150):
        uri = draw.choice(list(contents))
        if draw.random() < 0.1:
            contents[uri] = draw.randbytes(draw.randrange(1, 4000))
            storage.write_bytes(uri, contents[uri])
        assert storage.local(uri).read_bytes() == contents[uri]
        assert sum(map(len, copies().values())) <= 10_000
    with ThreadPoolExecutor(6) as pool:  # each reader can have one object in use
        jobs = [draw.choice(list(contents)) for _ in range(150)]

        def read(uri: str) -> bytes:
            with storage.lease(uri) as path:
                return path.read_bytes()

        assert list(pool.map(read, jobs)) == [contents[uri] for uri in jobs]
    assert sum(map(len, copies().values())) <= 10_000 + 6 * 4000


def test_a_lost_or_damaged_copy_is_fetched_again(bucket: Any) -> None:
    uri = put(bucket, "a.bin", b"whole content")
    storage.local(uri).unlink()
    assert storage.local(uri).read_bytes() == b"whole content"
    storage.local(uri).write_bytes(b"half")
    assert storage.local(uri).read_bytes() == b"whole content"
    storage.cache_folder().joinpath("size").write_text("")  # as a kill in the middle of writing it leaves it
    other = put(bucket, "b.bin")
    assert storage.local(other).read_bytes() == b"content"


def test_what_a_killed_process_left_is_cleared_away(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put(bucket, "a.bin", b"x" * 1000)
    path = storage.local(uri)
    left = path.with_name(f".{path.name}.1000.part")
    path.rename(left)
    assert storage.local(uri).read_bytes() == b"x" * 1000 and not left.exists()
    stale = path.with_name(".0123-4567.bin.5000.part")
    stale.write_bytes(b"y" * 100)
    monkeypatch.setenv("AMD_FAST_CACHE_GB", "1.5e-6")
    storage.local(put(bucket, "b.bin", b"z" * 1000))
    assert not stale.exists() and list(copies().values()) == [b"z" * 1000]


def test_a_full_disk_names_the_cache_and_the_setting(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put(bucket, "a.bin")

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "download", no_space)
    with pytest.raises(DecodeError, match=r"a\.bin: the disk of the cache .*cache is full; .*AMD_FAST_CACHE_GB .*AMD_FAST_CACHE"):
        storage.local(uri, error=DecodeError)
    assert not copies()


def test_a_cache_that_cannot_be_used(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AMD_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot be used .*set AMD_FAST_CACHE"):
        storage.local(put(bucket, "a.bin"))
    monkeypatch.setenv("AMD_FAST_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="AMD_FAST_CACHE_GB is 'much'"):
        storage.local(put(bucket, "a.bin"))


# --------------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("s3://{bucket}/none.mp4", DataError, "cannot read s3://.*/none.mp4: there is no such object or bucket"),
        ("s3://no-such-bucket-here/x.mp4", DataError, "there is no such object or bucket .*bucket does not exist"),
        ("s3://{bucket}/folder", DataError, "it is a folder"),
        ("nothing://x/y", ImplementationError, "nothing"),
    ],
)
def test_what_is_not_there(bucket: Any, uri: str, error: type[Exception], says: str) -> None:
    put(bucket, "folder/x")
    started = time.monotonic()
    with pytest.raises(error, match=says):
        storage.local(uri.format(bucket=bucket.name))
    assert time.monotonic() - started < 10  # nothing is repeated that no repetition changes


def test_wrong_credentials(bucket: Any, s3_endpoint: str) -> None:
    uri = put(bucket, "a.bin")

    def check_signatures_after(calls: bytes) -> None:
        address, headers = f"{s3_endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, data=calls, method="POST", headers=headers)).close()

    check_signatures_after(b"0")
    try:
        with pytest.raises(CheckpointError, match=r"cannot read .*a\.bin: access denied .*check the credentials"):
            storage.local(uri, error=CheckpointError)
        with pytest.raises(DataError, match=r"cannot write .*: access denied"):
            storage.write_bytes(uri, b"")
        with pytest.raises(DataError, match=r"cannot list .*: access denied"):
            storage.list_below(storage.parent(uri))
    finally:
        check_signatures_after(b"inf")


def test_no_credentials(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put(bucket, "a.bin")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    own_server(monkeypatch, os.environ["AWS_ENDPOINT_URL"])
    with pytest.raises(DataError, match=r"a\.bin: no credentials .*AWS_ACCESS_KEY_ID"):
        storage.local(uri)


def test_without_s3fs(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ImplementationError, match=r"pip install 'amd_fast\[remote\]'"):
        storage.local(f"s3://{bucket.name}/a.bin")


def test_a_server_that_goes_down(bucket: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own_server(monkeypatch, f"http://{host}:{port}")
    known, new = put(bucket, "known", b"known"), put(bucket, "new")  # the servers of a process share their buckets
    assert storage.local(known).read_bytes() == b"known"
    server.stop()
    monkeypatch.setenv("AMD_FAST_REMOTE_TIMEOUT", "1")
    started = time.monotonic()
    with pytest.raises(DataError, match=r"cannot read s3://.*/new: the store does not answer .*AMD_FAST_REMOTE_TIMEOUT") as caught:
        storage.local(new)
    assert storage.is_unreachable(caught.value)
    assert storage.local(known).read_bytes() == b"known" and "its copy in the cache is used" in caplog.text
    for _ in range(20):  # the store is known to be down: thousands of clips do not wait one after the other
        with pytest.raises(DataError):
            storage.local(new)
    assert time.monotonic() - started < 8
    monkeypatch.setenv("AMD_FAST_REMOTE_TIMEOUT", "20")
    timer = threading.Timer(0.5, lambda: ThreadedMotoServer(host, port, verbose=False).start())
    timer.start()
    storage.write_bytes(new, b"written")  # a write insists, and gets through when the server is back
    assert storage.local(new).read_bytes() == b"written"


def test_a_server_that_accepts_and_says_nothing(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_REMOTE_TIMEOUT", "0.5")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        own_server(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(DataError, match=r"the store does not answer .no answer for 0.5 s"):
            storage.local("s3://bucket/a")
        with pytest.raises(DataError, match="the store does not answer"):
            storage.list_below("s3://bucket/a")
        assert time.monotonic() - started < 10


def test_another_reader_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AMD_FAST_REMOTE_TIMEOUT", "0.3")
    uri = "memory://hang/a.bin"
    storage.write_bytes(uri, b"content")
    path = storage.local(uri)
    partial = path.with_name(f".{path.name}.7.part")
    path.rename(partial)
    with open(partial, "rb") as held:
        assert cache._try_lock(held.fileno())
        with pytest.raises(DataError, match="another process has been fetching it without progress"):
            storage.local(uri)


# --------------------------------------------------------------------------------------------------------------------- writing


def test_files_and_folders_are_written_to_uris(bucket: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = f"s3://{bucket.name}/made"
    write_atomically(f"{root}/one.txt", b"1")
    put(bucket, "made/set/other.txt", b"stays")
    with requests(caplog) as seen, written_folder(f"{root}/set") as folder:
        (folder / "a").mkdir()
        for name in ("a/x.txt", "b.txt", "c.txt", ".hidden"):
            (folder / name).write_text(name)
    assert get(bucket, "made/one.txt") == b"1" and get(bucket, "made/set/a/x.txt") == b"a/x.txt"
    assert storage.list_below(f"{root}/set") == ["b.txt", "c.txt", "other.txt", "a/x.txt"]
    changes = [line.replace(f"/{bucket.name}/made/set/", "") for line in seen if line.startswith(("PUT", "DELETE"))]
    assert changes == ["DELETE a/x.txt", "PUT c.txt", "PUT b.txt", "PUT a/x.txt"]
    assert not list((storage.cache_folder() / "work").iterdir())
    with pytest.raises(FileNotFoundError), storage.uploaded_folder(f"{root}/failed") as folder:
        (folder / "none" / "x").touch()
    assert not storage.exists(f"{root}/failed") and not list((storage.cache_folder() / "work").iterdir())


def test_what_cannot_be_uploaded_is_kept(bucket: Any) -> None:
    with (
        pytest.raises(CheckpointError, match="is kept in") as caught,
        written_folder("s3://no-such-bucket-here/x", error=CheckpointError) as folder,
    ):
        (folder / "x.txt").write_text("precious")
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert (kept / "x.txt").read_text() == "precious"
