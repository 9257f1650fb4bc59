"""From the body of a request to examples: a file, a form with files, JSON with base64, a tar.

All of it runs in the decoding processes (see `decoder`), since parsers of what strangers send are as exposed as
decoders of files. What the bytes are counts for more than what the Content-Type says: clients name it carelessly.
"""

import asyncio
import binascii
import io
import json
import tarfile
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

import numpy as np
import python_multipart  # noqa: F401  so that its absence is noticed here: starlette's parser asserts it, late
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from mixlab.data.modality import MAX_BYTES, Modality, Preprocess
from mixlab.errors import ExampleError, MixlabError

MAX_EXAMPLES = 64  # of one request
MAX_NAME, MAX_PATH = 255, 4096  # characters of a name that is shown, of one that is read
MAX_FIELD_BYTES = 1024  # of a form's field that is no file: none is wanted
MAX_JSON_PARTS = (
    10 * MAX_EXAMPLES
)  # objects, lists and commas: each costs many times its byte once it is read
SNIFFED_BYTES = 16  # of a body, that tell whether it is an example
PIECE = 2**16  # bytes that the form's parser takes at a time
FORM, JSON, CURL_TEXT = "multipart/form-data", "application/json", "application/x-www-form-urlencoded"


@dataclass(frozen=True)
class Decoded:
    """An example of a request: its name there; as `Preprocess` keeps it, or why it cannot be."""

    name: str
    kept: np.ndarray | None
    reason: str


@dataclass(frozen=True)
class Contents:
    """What a body holds. is_list: whether it came as several, even if there is one only."""

    examples: list[Decoded]
    is_list: bool


def read_body(data: bytes, content_type: str, plain: str, preprocess: Preprocess) -> Contents:
    """The examples of a body. plain: what it is where it is neither a form nor JSON, `file` or `tar`.

    ExampleError if it cannot be read at all; where only some cannot, they have a reason.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if not preprocess.modality.claims(data[:SNIFFED_BYTES]):
        if kind == FORM:
            files = form_files(data, content_type)
            return Contents([_read(name, content, preprocess) for name, content in files], len(files) > 1)
        if _is_json(data, kind):
            texts, is_list = json_texts(data, preprocess.modality)
            return Contents([_read_text(name, text, preprocess) for name, text in texts], is_list)
    if plain == "tar":
        return Contents(
            [
                Decoded(name, None, "not a plain file")
                if content is None
                else _read(name, content, preprocess)
                for name, content in tar_files(data)
            ],
            True,
        )
    found = _read("", data, preprocess)
    if found.kept is None and kind == CURL_TEXT:
        # `curl -d @photo.png` takes line breaks and zeros out of the file; nothing can put them back.
        found = Decoded(
            "",
            None,
            f"{found.reason}; if it was sent by curl -d, that damages files: send it by --data-binary",
        )
    return Contents([found], False)


def safe_name(name: str) -> str:
    """A name that a stranger chose: of usual length, and without what moves a cursor or turns the writing round."""
    shown = "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name[: MAX_NAME + 1]
    )
    return shown if len(shown) <= MAX_NAME else shown[: MAX_NAME - 1] + "…"


def _read(name: str, data: bytes, preprocess: Preprocess) -> Decoded:
    name = safe_name(name)
    try:
        return Decoded(name, preprocess.read(data), "")
    except MixlabError as error:  # what the machine lacks too, such as a library
        return Decoded(name, None, f"{error.message}{f' ({error.hint})' if error.hint else ''}")
    except MemoryError:
        return Decoded(name, None, "decoding it would take too much memory")


# -- a form --------------------------------------------------------------------------------------------------


class _InMemory(MultiPartParser):
    spool_max_size = 2 * MAX_BYTES  # more than a body has: nothing is ever written to disk


def form_files(data: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Name and content of the files of a form, in order. ExampleError if none, too many, or other fields."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        view = memoryview(data)
        for start in range(0, len(data), PIECE):
            yield bytes(view[start : start + PIECE])
        yield b""

    async def parse() -> list[tuple[str, bytes]]:
        headers = Headers({"content-type": content_type})
        form = await _InMemory(
            headers, pieces(), max_files=MAX_EXAMPLES, max_fields=MAX_EXAMPLES, max_part_size=MAX_FIELD_BYTES
        ).parse()
        found = []
        for field, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise ExampleError(f"the form's field {safe_name(field)!r} is no file")
            path = (value.filename or "").replace("\\", "/")  # some send the whole path of an image
            found.append((path.rpartition("/")[2] or safe_name(field), value.file.read()))
            value.file.close()
        return found

    try:
        found = asyncio.run(parse())
    except MultiPartException as error:
        raise ExampleError(f"the form cannot be read: {error.message}") from error
    except (ValueError, KeyError, LookupError) as error:
        raise ExampleError(f"the form cannot be read: {type(error).__name__}") from error
    if not found:
        raise ExampleError("the form has no files")
    return found


# -- JSON ----------------------------------------------------------------------------------------------------


def _is_json(data: bytes, kind: str) -> bool:
    """Also under another Content-Type (`curl -d '{...}'` says x-www-form-urlencoded). JSON has no zero bytes."""
    start = data[:512]
    return 0 not in start and (kind == JSON or kind.endswith("+json") or start.lstrip().startswith(b"{"))


def json_texts(data: bytes, modality: Modality) -> tuple[list[tuple[str, str]], bool]:
    """Names and base64 of `{"image": base64}` or `{"images": [base64, ...]}`, and whether it was a list.

    The keys are the modality's `one` and `many`.
    """
    one, many = modality.one, modality.many
    wanted = f'JSON is {{"{one}": BASE64}} or {{"{many}": [BASE64, ...]}}'
    if sum(data.count(char) for char in (b"{", b"[", b",")) > MAX_JSON_PARTS:
        raise ExampleError(f"more in it than {MAX_EXAMPLES} {many}; {wanted}")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ExampleError(f"not JSON that can be read; {wanted}") from error
    if not isinstance(found, dict) or len(found) != 1 or not found.keys() <= {one, many}:
        raise ExampleError(wanted)
    is_list = many in found
    texts = found[many] if is_list else [found[one]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ExampleError(f"each {one} is a string of base64; {wanted}")
    if not 1 <= len(texts) <= MAX_EXAMPLES:
        raise ExampleError(f"{len(texts)} {many}; one request has 1 to {MAX_EXAMPLES}")
    return [(f"{many}[{i}]" if is_list else one, text) for i, text in enumerate(texts)], is_list


def _read_text(name: str, text: str, preprocess: Preprocess) -> Decoded:
    try:
        return _read(name, from_base64(text), preprocess)
    except ExampleError as error:
        return Decoded(name, None, error.message)


def from_base64(text: str) -> bytes:
    """The bytes of base64 of either alphabet, with or without line breaks, padding and `data:...;base64,`."""
    head, comma, rest = text.partition(",")
    if comma:
        if not (head.startswith("data:") and head.endswith(";base64")):
            raise ExampleError("not base64")
        text = rest
    try:
        plain = text.encode("ascii").translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n")
        return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)
    except ValueError as error:  # binascii.Error is one
        raise ExampleError("not base64") from error


# -- a tar ---------------------------------------------------------------------------------------------------


def tar_files(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of the files of a plain tar, None for what is no plain file. ExampleError if it is no tar."""
    number = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if number == MAX_EXAMPLES:
                    raise ExampleError(f"more than {MAX_EXAMPLES} files in the tar")
                number += 1
                if len(member.name) > MAX_PATH:
                    raise ExampleError("a name in the tar is too long")
                name = member.name.encode("utf-8", "replace").decode()
                if not member.isfile() or member.issparse():  # a sparse one is larger than what came
                    yield name, None
                    continue
                file = archive.extractfile(member)
                yield name, b"" if file is None else file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ExampleError(f"not a tar that can be read: {type(error).__name__}") from error
    if not number:
        raise ExampleError("the tar has no files")
