"""`mixlab.files`: what disks and kills do to a file is in tests/training/test_reliability.py."""

import threading
from concurrent.futures import ThreadPoolExecutor

from mixlab.files import written_whole


def test_two_threads_that_write_one_file_both_end_well(tmp_path):
    both_have_written = threading.Barrier(2, timeout=60)

    def write(content: bytes) -> None:
        with written_whole(tmp_path / "file") as temporary:
            temporary.write_bytes(content)
            both_have_written.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"one", b"two")))
    assert (tmp_path / "file").read_bytes() in (b"one", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
