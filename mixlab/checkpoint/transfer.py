"""A file of known size over HTTP: appended to what is here of it, tried again where that may help, never too long.

Neither pooch nor huggingface_hub keeps all of that: LOG.md, 2026-12-01.
"""

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from mixlab.errors import WeightsError
from mixlab.files import write_atomically
from mixlab.version import __version__

CHUNK = 1 << 20
SIZE_TOLERANCE = 0.01 * 2**20  # sizes are known in MiB with two digits
TIMEOUT_SECONDS = 30.0
TRIES = 5
Progress = Callable[[int, int], None]


def receive(
    url: str, part: Path, total: float, progress: Progress | None, *, pause: float, otherwise: str
) -> None:
    """All of `url` into `part`, from where `part` ends if it is the same file there.

    total: bytes it should have. progress: called with (bytes done, bytes in all). pause: seconds before the second
    try, doubled for each more. WeightsError; `otherwise` is its hint: what to do where no try helps.
    """
    for attempt in range(TRIES):
        try:
            _receive_rest(url, part, total, progress)
            return
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            code = None
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                code = error.code
            if code is not None and code < 500 and code not in (408, 429):
                raise WeightsError(
                    f"the server answered {code} {getattr(error, 'reason', '')}", where=url, hint=otherwise
                ) from error
            if attempt == TRIES - 1:
                done = part.stat().st_size if part.exists() else 0
                reason = getattr(error, "reason", None) or error
                raise WeightsError(
                    f"the download failed {TRIES} times, the last time with: {reason}; {done} bytes are here",
                    where=url,
                    hint=f"try again, it goes on from there; or {otherwise}",
                ) from error
            time.sleep(pause * 2**attempt)


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https only, and never from https down to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = ("https://",) if req.full_url.startswith("https://") else ("https://", "http://")
        if not newurl.startswith(allowed):
            fp.close()
            raise WeightsError(
                f"the server sends us to {newurl[:200]}, which is not allowed", where=req.full_url
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive_rest(url: str, part: Path, total: float, progress: Progress | None) -> None:
    """Append the rest of `url` to `part`: from where it ends, if the server still has the same file."""
    tag_path = part.with_name(part.name + ".json")
    done = part.stat().st_size if part.exists() else 0
    tag = json.loads(tag_path.read_text())["etag"] if done and tag_path.exists() else None
    headers = {"User-Agent": f"mixlab/{__version__}", "Accept-Encoding": "identity"}
    if tag:  # without a tag nothing says that the rest belongs to the beginning
        headers |= {"Range": f"bytes={done}-", "If-Range": tag}
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what we have does not fit what is there: start again
            part.unlink(missing_ok=True)
            raise ConnectionError("the server has another file than before") from error
        raise
    with answer:
        if answer.status != 206:
            done = 0
        length = answer.headers.get("Content-Length")
        whole = None if length is None else done + int(length)
        if whole is not None and abs(whole - total) > SIZE_TOLERANCE:
            part.unlink(missing_ok=True)
            raise WeightsError(
                f"the server offers {whole} bytes, and the published file has {total / 2**20:.2f} MiB",
                where=url,
                hint="this is another file; check the address or MIXLAB_MIRROR",
            )
        limit = round(total + SIZE_TOLERANCE)
        if shutil.disk_usage(part.parent).free < limit - done:
            raise OSError(28, "No space left on device")
        write_atomically(tag_path, json.dumps({"etag": answer.headers.get("ETag")}).encode())
        with part.open("ab" if done else "wb") as file:
            while chunk := answer.read(CHUNK):
                done += len(chunk)
                if done > limit:
                    file.close()
                    part.unlink()
                    raise WeightsError("the server sends more than the published file has", where=url)
                file.write(chunk)
                if progress is not None:
                    progress(done, round(total))
        if done < (whole if whole is not None else total - SIZE_TOLERANCE):
            raise ConnectionError(f"the connection was cut after {done} bytes")
