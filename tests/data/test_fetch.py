"""Downloads and archives: servers that break off or lie, archives that reach outside.

All servers are local.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from egm_lib.data import __main__ as data_command
from egm_lib.data import fetch as fetching
from egm_lib.data.fetch import SOURCES, FetchError, Source, download, fetch, unpack

CONTENT = bytes(range(256)) * 4000
MD5 = ("md5", hashlib.md5(CONTENT).hexdigest())


class Server(ThreadingHTTPServer):
    """Serves CONTENT at every path; the attributes say how it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.break_after = []  # bytes after which the n-th answer breaks off
        self.stated_extra = 0  # bytes promised beyond what is sent
        self.ranges = True
        self.content, self.etag = CONTENT, '"v1"'
        self.status = 200
        self.asked = []

    def handle_error(self, *_):
        """A client that hangs up is expected here."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.zip"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        content, start = server.content, 0
        if server.status != 200:
            return self.send_error(server.status)
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start + server.stated_extra))
        self.send_header("ETag", server.etag)
        self.end_headers()
        stop = server.break_after.pop(0) if server.break_after else len(content)
        self.wfile.write(content[start : start + stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server, target, **options):
    download(server.url, target, wait_s=0, timeout_s=5, **options)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file_arrives_verified(server, tmp_path):
    get(server, tmp_path / "a.zip", checksum=MD5)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and left(tmp_path) == ["a.zip"]


def test_a_broken_connection_is_continued(server, tmp_path):
    server.break_after = [300_000, 0, 200_000]
    get(server, tmp_path / "a.zip", checksum=MD5)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=300000-", "bytes=500000-"]


def test_a_later_run_continues_too(server, tmp_path):
    server.break_after = [300_000, 0]
    with pytest.raises(FetchError, match="start again"):
        get(server, tmp_path / "a.zip", attempts=1)
    assert not (tmp_path / "a.zip").exists()
    get(server, tmp_path / "a.zip", checksum=MD5)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and server.asked[-1] == "bytes=300000-"


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges, server.break_after = False, [300_000]
    get(server, tmp_path / "a.zip", checksum=MD5)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_parts_of_different_versions_are_not_joined(server, tmp_path):
    server.break_after = [300_000, 0]
    with pytest.raises(FetchError):
        get(server, tmp_path / "a.zip", attempts=1)
    server.content, server.etag = CONTENT[::-1], '"v2"'
    get(server, tmp_path / "a.zip")  # no checksum known: the version must tell
    assert (tmp_path / "a.zip").read_bytes() == CONTENT[::-1]


def test_a_finished_part_is_not_downloaded_again(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(CONTENT)  # killed just before it was renamed
    (tmp_path / "a.zip.part.version").write_text(server.etag)
    get(server, tmp_path / "a.zip", checksum=MD5)
    assert left(tmp_path) == ["a.zip"]


def test_a_file_shorter_than_its_stated_length_is_refused(server, tmp_path):
    server.stated_extra, server.ranges = 10, False
    with pytest.raises(FetchError, match="gave up"):
        get(server, tmp_path / "a.zip", attempts=2)
    assert not (tmp_path / "a.zip").exists()


def test_a_length_that_is_too_short_fails_the_checksum(server, tmp_path):
    server.stated_extra = -1000
    with pytest.raises(FetchError, match="thrown away"):
        get(server, tmp_path / "a.zip", checksum=MD5)
    assert left(tmp_path) == []


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(FetchError, match="md5 is .*, not 0000"):
        get(server, tmp_path / "a.zip", checksum=("md5", "0000"))
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_not_repeated(server, tmp_path, status):
    server.status = status
    with pytest.raises(FetchError, match=str(status)):
        get(server, tmp_path / "a.zip")
    assert len(server.asked) == 1


def test_a_full_disk_is_reported_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(FetchError, match="make room"):
        get(server, tmp_path / "a.zip")


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_an_archive_is_unpacked(tmp_path, make):
    archive = make(
        tmp_path / "a", {"refcoco/refs(unc).p": b"1" * 5000, "refcoco/instances.json": b"{}"}
    )
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out/refcoco/refs(unc).p").read_bytes() == b"1" * 5000
    assert left(tmp_path / "out/refcoco") == ["instances.json", "refs(unc).p"]


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:\\evil"])
def test_nothing_is_unpacked_from_an_archive_that_reaches_outside(tmp_path, make, name):
    archive = make(tmp_path / "a", {"good": b"1", name: b"2"})
    with pytest.raises(FetchError, match="nothing was unpacked"):
        unpack(archive, tmp_path / "out")
    assert left(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("link")
    link.type, link.linkname = kind, "/etc"
    with pytest.raises(FetchError, match="link or a device"):
        unpack(make_tar(tmp_path / "a", {link: b"", "link/passwd": b"x"}), tmp_path / "out")
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b", "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(FetchError, match="link or a device"):
        unpack(tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bomb_is_refused(tmp_path):
    with pytest.raises(FetchError, match="implausible for a data set"):
        unpack(make_zip(tmp_path / "a", {"zeros": bytes(20_000_000)}), tmp_path / "out")
    assert left(tmp_path) == ["a"]


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_broken_archive_is_one_sentence(tmp_path, make):
    archive = make(tmp_path / "a", {"x": hashlib.sha512(b"1").digest() * 100})
    for broken in (archive.read_bytes()[:-40], b"<html>quota exceeded</html>"):
        archive.write_bytes(broken)
        with pytest.raises(FetchError, match="^[^\n]*broken archive[^\n]*fetch it again$"):
            unpack(archive, tmp_path / "out")


def test_a_gzip_whose_bytes_changed_and_an_encrypted_zip_are_one_sentence(tmp_path):
    archive = make_tar(tmp_path / "a", {"x": hashlib.sha512(b"1").digest() * 100})
    data = bytearray(archive.read_bytes())
    data[-6] ^= 1  # in the checksum, which tarfile alone never looks at
    archive.write_bytes(data)
    with pytest.raises(FetchError, match="broken archive"):
        unpack(archive, tmp_path / "out")
    archive = make_zip(tmp_path / "b", {"x": b"1"})
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(FetchError, match="encrypted"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fetch_downloads_unpacks_and_remembers(server, tmp_path):
    path = make_zip(tmp_path / "made", {"refcoco/instances.json": b"{}"})
    server.content = path.read_bytes()
    source = Source("refcoco", "none", (server.url,), "downloads/refcoco.zip", ".")
    root = tmp_path / "root"
    fetch(source, root)
    assert (root / "refcoco/instances.json").read_bytes() == b"{}"
    (root / "downloads/refcoco.zip").unlink()  # may be deleted by a person
    fetch(source, root)
    assert len(server.asked) == 1


def test_the_second_address_is_tried_and_the_way_by_hand_named(server, tmp_path):
    nobody = "http://127.0.0.1:9/file.zip"  # the discard port: nobody answers
    fetch(Source("x", "none", (nobody, server.url), "x.zip"), tmp_path, wait_s=0)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    with pytest.raises(FetchError, match="by hand"):
        fetch(Source("y", "none", (nobody,), "y.zip"), tmp_path, wait_s=0)


def test_what_may_not_be_fetched_says_how_to(tmp_path, capsys):
    assert fetch(SOURCES["tao_frames"], tmp_path) is None
    assert "form" in capsys.readouterr().out and left(tmp_path) == []


def refused(self):
    """A hub that gives nothing to a user without an account that has accepted the terms."""
    self.server.asked.append((self.path, self.headers.get("Authorization")))
    self.send_response(401)
    self.send_header("X-Error-Code", "GatedRepo")
    self.end_headers()


def test_the_hub_gets_the_users_token_and_a_refusal_says_what_to_do(server, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_GET", refused)
        patch.setattr(Handler, "do_HEAD", refused, raising=False)
        environment = os.environ | {
            "HF_ENDPOINT": server.url.removesuffix("/file.zip"),
            "HF_TOKEN": "hf_the_users_token",
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-m", "egm_lib.data", "fetch", "tao_amodal_train", "--root", tmp_path],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    tokens = {token for path, token in server.asked if "TAO-Amodal" in path}
    assert tokens == {"Bearer hf_the_users_token"}
    assert "accept the terms" in done.stderr and "hf auth login" in done.stderr
    assert "hf_the_users_token" not in done.stdout + done.stderr
    assert done.returncode == 0  # it is optional


def unavailable(*_, **__):
    raise ConnectionError("no route to the hub")


def test_fetch_continues_after_a_source_that_is_not_available(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unavailable)
    sources = {
        "tao": Source("tao", "none", hub="someone/tao", hub_patterns=("a.json",), optional=True),
        "nobody": Source("nobody", "none", ("http://127.0.0.1:9/file.zip",), "nobody.zip"),
        "vanilla": Source("vanilla", "none", (server.url,), "vanilla.zip"),
    }
    monkeypatch.setattr(data_command, "SOURCES", sources)
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)
    assert data_command.main(["fetch", "--root", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "tao: someone/tao could not be fetched from the hub (no route to the hub)" in errors
    assert "can do without" in errors and "nobody: if this keeps failing" in errors
    assert (tmp_path / "vanilla.zip").read_bytes() == CONTENT
    del sources["nobody"]  # what is optional is no failure
    assert data_command.main(["fetch", "--root", str(tmp_path)]) == 0


def test_a_file_that_the_hub_lacks_is_an_error(tmp_path, monkeypatch):
    """snapshot_download is content if nothing matches its patterns."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    with pytest.raises(FetchError, match="has no file amodal_annotations/train.json any more"):
        fetch(SOURCES["tao_amodal_train"], tmp_path)


def test_every_source_states_its_licence_and_a_way():
    for source in SOURCES.values():
        assert source.licence and (source.urls or source.hub or source.manual)
