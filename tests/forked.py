"""The command `mixlab` in forks of one process that has imported everything: as a person types it, but for the wait.

Started by itself, this file is that process: each line of its input asks for a command, each line it writes is an
exit status. What only a new process shows (variables that libraries read when they are imported) needs a real one.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

MIXLAB = [sys.executable, "-m", "mixlab"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "0", "MIXLAB_OFFLINE": "0"}
TIMEOUT = 240  # seconds


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-u", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    atexit.register(server.kill)
    return server


def mixlab(
    *arguments: object,
    cwd: Path,
    max_file_bytes: int | None = None,
    stdout: str = "file",
    stderr: str = "file",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run `mixlab ARGUMENTS` in `cwd`; where no file may grow beyond `max_file_bytes`, as on a full disk.

    stdout, stderr: `file`, whose text is returned, `closed`, `broken` (a pipe that nobody reads) or `full` (a disk).
    """
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        request = {
            "arguments": command,
            "cwd": str(cwd),
            "outputs": [str(path) for path in outputs],
            "kinds": [stdout, stderr],
            "max_file_bytes": max_file_bytes,
            "environment": environment,
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        texts = [path.read_text() if path.exists() else "" for path in outputs]
    return subprocess.CompletedProcess(command, status, *texts)


def _become(request: dict) -> NoReturn:
    """Turn this fork into the command."""
    import resource

    import mixlab
    from mixlab.cli import main

    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, (path, kind) in enumerate(zip(request["outputs"], request["kinds"], strict=True), start=1):
        if kind == "closed":
            os.close(number)
            name = ("stdout", "stderr")[number - 1]
            setattr(sys, name, None)  # as Python begins in such a process
            setattr(sys, f"__{name}__", None)
        elif kind == "broken":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, number)
        else:
            path = "/dev/full" if kind == "full" else path
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    if request["max_file_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"],) * 2)
    mixlab.STARTED = time.monotonic()
    sys.argv = ["mixlab", *request["arguments"]]
    try:
        main()
    except SystemExit as ended:
        # As Python ends, but for taking every module apart: in a fork that copies hundreds of megabytes of memory.
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    raise AssertionError("main() exits")


def _serve() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch._dynamo  # noqa: F401  (optimizers bring it in)

    import mixlab.commands.learning
    import mixlab.commands.measuring
    import mixlab.commands.using
    import mixlab.commands.weights
    import mixlab.recipes
    import mixlab.serving.predict
    import mixlab.training.evaluate  # noqa: F401

    gc.collect()
    gc.freeze()  # a collection in a fork would copy all that was imported
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        deadline = time.monotonic() + TIMEOUT
        ended = (0, 0)
        while ended[0] == 0:
            ended = os.waitpid(child, os.WNOHANG)
            if ended[0] == 0 and time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


if __name__ == "__main__":
    _serve()
