"""Tar shards that say they are larger than they are."""

import tarfile
import tracemalloc

import pytest

from mixlab.data.shard_writer import index_shards
from mixlab.errors import DataError

CLAIMED = 300 * 2**20


def header(kind, size, name="a.jpg"):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_gigabytes_is_refused_and_not_read(tmp_path, kind):
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(header(kind, CLAIMED))
        file.truncate(CLAIMED + 4096)  # a sparse file: it takes no room
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="too large"):
            index_shards(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 70 * 2**20
    finally:
        tracemalloc.stop()


def test_a_sparse_picture_is_no_plain_file(tmp_path):
    records = b"".join(
        f"{len(text) + 3 if len(text) < 7 else len(text) + 4} {text}\n".encode()
        for text in ("GNU.sparse.size=60000000", "GNU.sparse.numblocks=1", "GNU.sparse.map=0,3")
    )
    content = records.ljust(-(-len(records) // 512) * 512, b"\0")
    (tmp_path / "x.tar").write_bytes(
        header(tarfile.XHDTYPE, len(records))
        + content
        + header(tarfile.REGTYPE, 3)
        + b"abc".ljust(512, b"\0")
        + bytes(10240)
    )
    with tarfile.open(tmp_path / "x.tar") as archive:
        (member,) = archive.getmembers()
        assert member.issparse()
        assert member.size == 60_000_000
    with pytest.raises(DataError, match="no plain file"):
        index_shards(tmp_path)


@pytest.mark.parametrize("size", ["9" * 23, "-5", "a"])
def test_a_size_that_is_no_size_is_an_error_of_the_shard(tmp_path, size):
    text = f" size={size}\n"
    record = f"{len(text) + 2}{text}".encode()
    (tmp_path / "x.tar").write_bytes(
        header(tarfile.XHDTYPE, len(record))
        + record.ljust(512, b"\0")
        + header(tarfile.REGTYPE, 3)
        + bytes(10240)
    )
    with pytest.raises(DataError):
        index_shards(tmp_path)
