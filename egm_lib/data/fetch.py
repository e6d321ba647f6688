"""Download, verify and unpack what may be downloaded; say how to get the rest."""

import gzip
import hashlib
import lzma
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from egm_lib.errors import EgmError
from egm_lib.files import atomic_open

CHUNK_BYTES = 1 << 20
RESERVE_BYTES = 1 << 30  # left free on the disk
# Unpacked bytes per archived byte; annotations reach about 10, a bomb a thousand
MAX_EXPANSION = 200


class FetchError(EgmError, RuntimeError):
    """A download or an archive that failed. The message says what to do."""


@dataclass(frozen=True)
class Source:
    """One thing to fetch. Paths are relative to the data root."""

    name: str
    licence: str
    urls: tuple[str, ...] = ()  # tried in this order
    file: str = ""  # where the download is kept
    unpack_to: str | None = None
    checksum: tuple[str, str] | None = None  # (algorithm, hex digest), if one is published
    hub: str | None = None  # data set of the Hugging Face hub
    hub_patterns: tuple[str, ...] = ()  # its files that are wanted
    manual: str | None = None  # what a person has to do, if we may not download it
    optional: bool = False  # whether training data can be prepared without it


_REFER = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
_HUB = "https://huggingface.co/datasets"
_COCO_LICENCE = "annotations CC BY 4.0; images: Flickr's terms of use, each its own licence"


def _coco(split: str, md5: str) -> Source:
    return Source(
        f"coco_{split}",
        _COCO_LICENCE,
        (f"http://images.cocodataset.org/zips/{split}.zip",),
        f"downloads/{split}.zip",
        "images",
        ("md5", md5),
    )


def _refer(name: str, archived: str, sha256: str) -> Source:
    mirror = f"https://web.archive.org/web/{archived}id_/{_REFER}/{name}.zip"
    return Source(
        name,
        "annotations: no licence stated by refer (its code is Apache-2.0); images as COCO",
        (mirror, f"{_REFER}/{name}.zip"),
        f"downloads/{name}.zip",
        ".",
        ("sha256", sha256),
    )


SOURCES = {
    source.name: source
    for source in (
        _coco("train2014", "0da8c0bd3d6becc4dcb32757491aca88"),
        _coco("val2014", "a3d79f5ed8d289b7a7554ce06a5782b3"),
        _refer(
            "refcoco",
            "20220413011718",
            "7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
        ),
        _refer(
            "refcoco+",
            "20220413011656",
            "5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
        ),
        _refer(
            "refcocog",
            "20220413012904",
            "3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
        ),
        Source(
            "coco_amodal",
            "annotations: none stated by amodalAPI; images as COCO",
            ("https://www.dropbox.com/s/4znu1sbf67c8c96/annotations.tar.gz?dl=1",),
            "downloads/coco_amodal.tar.gz",
            "coco_amodal",
        ),
        *(
            Source(
                f"tao_amodal_{split}",
                "MIT (annotations)",
                hub="chengyenhsieh/TAO-Amodal",
                hub_patterns=(f"amodal_annotations/{split}.json",),
                file="tao_amodal",
                optional=True,
            )
            for split in ("train", "validation")
        ),
        Source(
            "tao_frames",
            "each video source its own; AVA and HACS by request",
            manual=(
                "TAO's frames may not be fetched without a request: AVA and HACS videos are given "
                "out by a form. Follow "
                f"{_HUB}/chengyenhsieh/TAO-Amodal (download_frames.sh) and unpack, so that the "
                "file "
                "<root>/images/tao/train/YFCC100M/... exists."
            ),
        ),
        Source(
            "egm_datasets",
            "as stated on its hub page",
            hub="JamesZGQ/EGM_Datasets",
            hub_patterns=("metadata/eval/*.jsonl", "processed_rl_data/*.parquet"),
            file="egm_datasets",
        ),
    )
}


def fetch(source: Source, root: str | Path, wait_s: float = 2.0) -> Path | None:
    """Fetches one source into a data root.

    What is there already is not fetched again, and a partial download is continued.
    wait_s: pause after the first failed try; then two, three times as long.
    Returns where the source lies, or None if a person has to act (the instruction is printed).
    Raises FetchError.
    """
    root = Path(root)
    if source.manual:
        print(f"{source.name}: {source.manual}")
        return None
    if source.hub:
        return _from_hub(source, root)
    target, done = root / source.file, root / "downloads" / f"{source.name}.unpacked"
    if done.exists():
        print(f"{source.name}: there already; delete {done} to fetch and unpack it again")
        return root / source.unpack_to
    if target.exists():
        print(f"{source.name}: {target} is there already; delete it to fetch it again")
    else:
        failures = []
        for url in source.urls:
            try:
                download(url, target, checksum=source.checksum, wait_s=wait_s)
                break
            except FetchError as error:
                failures.append(str(error))
        else:
            raise FetchError(
                "\n".join(failures)
                + f"\n{source.name}: if this keeps failing, get the file by hand, put it at "
                f"{target} and start again"
            )
    if source.unpack_to is None:
        return target
    unpack(target, root / source.unpack_to)
    done.touch()
    print(f"{source.name}: unpacked; {target} is no longer needed")
    return root / source.unpack_to


def _from_hub(source: Source, root: Path) -> Path:
    """Downloads through the hub's client, which uses the token of `hf auth login` or HF_TOKEN."""
    import httpx2  # only here: the imports take a second
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    target = root / source.file
    try:
        snapshot_download(
            source.hub,
            repo_type="dataset",
            allow_patterns=list(source.hub_patterns),
            local_dir=target,
        )
    except RepositoryNotFoundError as error:  # which the hub also says of one that you may not see
        raise FetchError(
            f"{source.name}: the hub refuses you access to {source.hub}. If {_HUB}/{source.hub} "
            "asks for it, accept the terms there; then log in with `hf auth login` and start again"
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise FetchError(
            f"{source.name}: {source.hub} could not be fetched from the hub ({reason}). By hand: "
            f"`hf download {source.hub} --repo-type dataset --local-dir {target}`"
        ) from error
    for pattern in source.hub_patterns:
        if not any(target.glob(pattern)):
            raise FetchError(
                f"{source.name}: {_HUB}/{source.hub} has no file {pattern} any more; look there "
                f"where it is now, and put it at {target / pattern}"
            )
    return target


def download(
    url: str,
    target: Path,
    *,
    checksum: tuple[str, str] | None = None,
    attempts: int = 5,
    timeout_s: float = 60.0,
    wait_s: float = 2.0,
) -> None:
    """Downloads url to target, whole and verified or not at all; continues a broken download.

    checksum: (algorithm, hex digest). attempts: tries without progress before giving up.
    Raises FetchError if the server cannot be reached, sends fewer or more bytes than promised, if
    the checksum is wrong, or the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _continue(url, part, timeout_s)
            break
        except (OSError, HTTPException, _Incomplete) as error:
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            if status in (401, 403, 404, 410):
                raise FetchError(f"{url}: the server says {status} {error.reason}") from error
            if status == 416:  # nothing after what we have
                if error.headers.get("Content-Range") == f"bytes */{before}":
                    break
                _forget(part)
            after = part.stat().st_size if part.exists() else 0
            fruitless = 0 if after > before else fruitless + 1
            if fruitless >= attempts:
                raise FetchError(
                    f"{url}: gave up after {attempts} tries without progress ({error}); "
                    f"{after} bytes are kept, start again to continue"
                ) from error
            time.sleep(wait_s * fruitless)
    if checksum and (found := _digest(part, checksum[0])) != checksum[1]:
        _forget(part)
        raise FetchError(
            f"{url}: {checksum[0]} is {found}, not {checksum[1]} as published; the file was thrown "
            "away"
        )
    part.replace(target)
    _forget(part)


class _Incomplete(Exception):
    """The connection ended before the last byte."""


def _continue(url: str, part: Path, timeout_s: float) -> None:
    """Appends to `part` what is missing; returns when it has the length that the server states."""
    have = part.stat().st_size if part.exists() else 0
    version = _version_file(part).read_text() if have and _version_file(part).exists() else ""
    headers = {"User-Agent": "egm_lib", "Accept-Encoding": "identity"}
    # Without a version to ask for, a changed file would be glued to the old one
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with closing(
        urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    ) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        if answer.status != 200 and not resumed:
            _forget(part)
            raise _Incomplete(
                f"an answer of status {answer.status} that is not the rest of the file"
            )
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        if resumed and answer.headers["Content-Range"].rpartition("/")[2] not in ("*", str(total)):
            _forget(part)
            raise _Incomplete("the length of the rest contradicts that of the whole file")
        _need_room(part.parent, (total or 0) - have, url)
        _version_file(part).write_text(
            answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        )
        bar = tqdm(
            desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, mininterval=5
        )
        with open(part, "ab" if resumed else "wb") as file, bar:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
                if bar.n % (256 * CHUNK_BYTES) < CHUNK_BYTES:
                    _need_room(part.parent, 0, url)
    if total is not None and have != total:
        raise _Incomplete(f"the connection ended after {have} of {total} bytes")


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _need_room(folder: Path, wanted_bytes: int, what: str | Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes + RESERVE_BYTES:
        raise FetchError(
            f"{what}: needs {wanted_bytes / 1e9:.1f} GB and {RESERVE_BYTES / 1e9:.1f} GB to spare, "
            "but "
            f"{folder} has {free / 1e9:.1f} GB; make room and start again"
        )


@dataclass(frozen=True)
class _Member:
    name: str
    bytes: int
    is_folder: bool
    is_file: bool
    opened: object  # () -> IO[bytes]


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip or tar (plain, gz, xz) below folder; files of the right size are kept.

    Every member is checked before the first is written.
    Raises FetchError for an absolute path, "..", a link or device, a size beyond the disk or beyond
    MAX_EXPANSION times the archive, and for a broken archive.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                _unpack_members(list(_zip_members(opened)), archive, folder)
        else:
            with tarfile.open(archive) as opened:
                members = list(_tar_members(opened))
                while opened.fileobj.read(CHUNK_BYTES):
                    pass  # to the end, which tarfile does not read: gzip's checksum is there
                _unpack_members(members, archive, folder)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        gzip.BadGzipFile,
        lzma.LZMAError,
        EOFError,
        zlib.error,
    ) as error:
        # tarfile adds a line for every format that it tried
        reason = str(error).partition("\n")[0].rstrip(":")
        raise FetchError(
            f"{archive}: a broken archive ({reason}); delete it and fetch it again"
        ) from error


def _zip_members(opened: zipfile.ZipFile) -> Iterator[_Member]:
    for info in opened.infolist():
        if info.flag_bits & 1:
            raise FetchError(
                f"{opened.filename}: member {info.filename!r} is encrypted; nothing was unpacked"
            )
        kind = stat.S_IFMT(info.external_attr >> 16)
        is_file = not info.is_dir() and kind in (0, stat.S_IFREG)
        yield _Member(
            info.filename,
            info.file_size,
            info.is_dir(),
            is_file,
            lambda info=info: opened.open(info),
        )


def _tar_members(opened: tarfile.TarFile) -> Iterator[_Member]:
    for info in opened:
        yield _Member(
            info.name,
            info.size,
            info.isdir(),
            info.isreg(),
            lambda info=info: opened.extractfile(info),
        )


def _unpack_members(members: list[_Member], archive: Path, folder: Path) -> None:
    for member in members:
        path = PurePosixPath(member.name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in member.name:
            raise FetchError(
                f"{archive}: member {member.name!r} would be written outside {folder}; nothing was "
                "unpacked"
            )
        if not (member.is_folder or member.is_file):
            raise FetchError(
                f"{archive}: member {member.name!r} is a link or a device; nothing was unpacked"
            )
    size = sum(member.bytes for member in members)
    if size > MAX_EXPANSION * archive.stat().st_size:
        raise FetchError(
            f"{archive}: {size} bytes unpacked from {archive.stat().st_size}; that is implausible "
            "for a data set"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _need_room(folder, size, archive)
    for member in tqdm(
        members, desc=f"unpack {archive.name}", mininterval=5, disable=len(members) < 100
    ):
        target = folder / member.name.replace("\\", "/")
        if member.is_file and not (target.is_file() and target.stat().st_size == member.bytes):
            with member.opened() as source, atomic_open(target, "wb") as file:
                _copy(source, file, member.bytes, f"{archive}: member {member.name!r}")


def _copy(source: IO[bytes], file: IO[bytes], size: int, what: str) -> None:
    copied = 0
    while chunk := source.read(CHUNK_BYTES):
        copied += len(chunk)
        if copied > size:
            break
        file.write(chunk)
    if copied != size:
        raise FetchError(f"{what} does not have the {size} bytes that it states")
