"""Released weights onto this machine: downloaded once, whole, recorded and verified."""

import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixlab.checkpoint.published import OFFICIAL_URL, PUBLISHED, SHIPPED, Published
from mixlab.checkpoint.transfer import SIZE_TOLERANCE, Progress, receive
from mixlab.errors import DiskError, WeightsError
from mixlab.files import can_be_written, sha256, take_lock, write_atomically
from mixlab.records import read_json, take

OTHER_CACHE = "MIXLAB_CACHE in the environment names another folder"
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # nobody is on the way to this machine itself


def list_published() -> list[dict[str, Any]]:
    """A row for each entry, with `input_range`, and `cached`: whether it is on this machine."""
    return [
        asdict(entry) | {"input_range": entry.input_range, "cached": _cached(entry)}
        for entry in PUBLISHED.values()
    ]


def cache_folder() -> Path:
    """$MIXLAB_CACHE, else mixlab below $XDG_CACHE_HOME or ~/.cache. DiskError where there is no home folder."""
    try:
        if "MIXLAB_CACHE" in os.environ:
            return Path(os.environ["MIXLAB_CACHE"]).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mixlab"
    except RuntimeError:
        raise DiskError("there is no home folder to keep weights in", hint=OTHER_CACHE) from None


def _cache_path(published: Published) -> Path:
    if published.is_shipped:
        return SHIPPED / published.name.replace(":", "-")
    # By folder and name: the same file names stand in several folders of the server.
    return cache_folder().joinpath(*published.url.removeprefix(OFFICIAL_URL + "/").split("/"))


def _cached(published: Published) -> bool:
    try:
        path = _cache_path(published)
    except DiskError:
        return False
    return (path / "model.safetensors").is_file() if published.is_hub else path.exists()


def is_offline() -> bool:
    """Whether the person wants the network left alone."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("MIXLAB_OFFLINE", "HF_HUB_OFFLINE"))


def fetch_published(published: Published, *, progress: Progress | None = None, pause: float = 1.0) -> Path:
    """The file (for timm's and shipped ones, the folder) on this machine; downloaded if it is not there yet.

    A file is verified, also one that was there. progress: called with (bytes done, bytes in all). pause: seconds
    before the second try, doubled for each more. $MIXLAB_MIRROR replaces the server. WeightsError says what went
    wrong and what to do, DiskError a full disk.
    """
    path = _cache_path(published)
    if published.is_shipped:
        return path
    if published.is_hub:
        path = _fetch_hub(published, path)
        _verify(published, path)
        return path
    if not path.exists():
        if is_offline():
            raise WeightsError(
                f"{published.name} is not on this machine, and MIXLAB_OFFLINE or HF_HUB_OFFLINE is set",
                where=str(path),
                hint=_by_hand(published, path),
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path) as is_locked:
                if not path.exists():  # somebody else may have fetched it while we waited
                    # Without a lock two processes may fetch it at once: each into a file of its own.
                    part = path.with_name(path.name + (".part" if is_locked else f".{os.getpid()}.part"))
                    _download(published, path, part, progress, pause)
        except OSError as error:
            raise DiskError(
                f"could not write: {error.strerror or error}",
                where=str(path),
                hint=f"is the disk full? {OTHER_CACHE}; what was fetched is kept and used",
            ) from error
    _verify(published, path)
    return path


def _by_hand(published: Published, path: Path) -> str:
    return f"download {published.url} elsewhere and put it at {path}, or name the file itself instead"


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def origin_of(published: Published, path: Path) -> tuple[dict[str, Any], str | None]:
    """Where the file at `path` came from, as it was recorded, and what a person should be told of that.

    For the provenance: url (None for a file put there by hand), sha256, is_verified.
    """
    if published.is_shipped:
        return {}, None
    record: dict[str, Any] = {"url": None, "sha256": None}
    if _record_path(path).exists():
        record = _read_record(published, path)
    facts = {
        "url": record["url"],
        "sha256": record["sha256"],
        "is_verified": published.sha256 is not None and record["sha256"] == published.sha256,
    }
    if facts["is_verified"]:
        return facts, None
    came = f"came from {record['url']}" if record["url"] else "was put there by hand"
    return facts, f"unverified: nobody has stated the SHA-256 of {published.name}, and this file {came}"


def _tensors_of(published: Published, path: Path) -> Path:
    return path / "model.safetensors" if published.is_hub else path


def check_address(url: str, published: Published) -> None:
    """WeightsError for an address on whose way anybody could send other weights, unless their hash is known."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and published.sha256 is None and parts.hostname not in LOOPBACK:
        raise WeightsError(
            f"{published.name} has no known SHA-256, so it is taken over https only",
            where=url,
            hint="give a mirror that speaks https, or download the file yourself and name it",
        )


def _verify(published: Published, path: Path) -> None:
    """The size, and the SHA-256 recorded when the file came; a file put there by hand is recorded now."""
    hint = f"delete it to download it again from {published.url}"
    file = _tensors_of(published, path)
    size = file.stat().st_size
    if not published.is_hub and abs(size - published.size_mib * 2**20) > SIZE_TOLERANCE:
        raise WeightsError(
            f"it has {size} bytes, {published.name} has {published.size_mib} MiB", where=str(path), hint=hint
        )
    found = sha256(file)
    if published.sha256 is not None and found != published.sha256:
        raise WeightsError(
            f"it is not {published.name}: its SHA-256 is not the published one", where=str(file), hint=hint
        )
    if not _record_path(path).exists():
        _write_record(published, path, found, None)
    elif _read_record(published, path)["sha256"] != found:
        raise WeightsError(
            "it has changed since it was downloaded: its SHA-256 differs", where=str(path), hint=hint
        )


def _read_record(published: Published, path: Path) -> dict[str, Any]:
    where = str(_record_path(path))
    try:
        record = read_json(_record_path(path), follow=True)
        take(record, "sha256", str, where)
        take(record, "url", str, where, optional=True)
    except WeightsError as error:
        hint = f"delete it and the file to download that again from {published.url}"
        raise WeightsError(f"its record is damaged: {error.message}", where=where, hint=hint) from error
    return record


def _write_record(published: Published, path: Path, digest: str, url: str | None) -> None:
    """url: where the file came from; None for one that was put there."""
    record = {
        "url": url,
        "size": _tensors_of(published, path).stat().st_size,
        "sha256": digest,
        "date": time.strftime("%Y-%m-%d"),
    }
    write_atomically(_record_path(path), (json.dumps(record, indent=2) + "\n").encode())


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """One process downloads a file, others wait; whether the file system can do that.

    The lock goes with the process that holds it.
    """
    with path.with_name(path.name + ".lock").open("w") as lock:
        yield take_lock(lock, wait=True)


def _download(published: Published, path: Path, part: Path, progress: Progress | None, pause: float) -> None:
    mirror = os.environ.get("MIXLAB_MIRROR")
    url = published.url if mirror is None else published.url.replace(OFFICIAL_URL, mirror.rstrip("/"))
    check_address(url, published)
    receive(url, part, published.size_mib * 2**20, progress, pause=pause, otherwise=_by_hand(published, path))
    with part.open("rb") as file:
        os.fsync(file.fileno())
    digest = sha256(part)
    if published.sha256 is not None and digest != published.sha256:
        part.unlink()
        raise WeightsError(
            f"what came is not {published.name}: its SHA-256 is not the published one",
            where=url,
            hint="check the address or MIXLAB_MIRROR",
        )
    os.replace(part, path)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    _write_record(published, path, digest, url)


def _fetch_hub(published: Published, path: Path) -> Path:
    """A folder of timm's on the Hugging Face Hub, through its library: config.json and model.safetensors only."""
    if _cached(published):
        return path
    if is_offline():
        raise WeightsError(
            f"{published.name} is not on this machine, and MIXLAB_OFFLINE or HF_HUB_OFFLINE is set",
            where=str(path),
            hint=f"put config.json and model.safetensors of {published.url} there",
        )
    if not can_be_written(path):
        raise DiskError("the cache of weights cannot be written", where=str(path), hint=OTHER_CACHE)
    from huggingface_hub import constants, snapshot_download

    address = f"{constants.ENDPOINT}/{published.url}"
    check_address(address, published)
    files = ["config.json", "model.safetensors"]
    try:
        snapshot_download(published.url, allow_patterns=files, local_dir=path)
    except Exception as error:  # of its own, of the network library beneath, of the disk: many kinds
        raise WeightsError(
            f"the Hub did not give {published.url}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            where=str(path),
            hint="try again later, or put config.json and model.safetensors there by hand",
        ) from error
    if not _cached(published):
        raise WeightsError("the Hub has no model.safetensors there", where=published.url)
    _write_record(published, path, sha256(_tensors_of(published, path)), address)
    return path
