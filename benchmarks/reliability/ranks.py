"""Processes that train together, forked from one that has imported everything: starting Python anew takes seconds."""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from mixlab.planning import train
from mixlab.training.signals import Interrupted

# torch starts the threads of its backward passes in the first one, for all devices that it then knows of. An export
# makes one known that needs threads, and a process with them cannot be forked as here (mixlab itself never does).
torch.ones((), requires_grad=True).backward()

BEFORE_TRAINING = 99  # exit status of a process stopped while it was still reading the data


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def start(job: Callable[[], Any], *, size: int = 1, with_report: bool = False) -> list[int]:
    """Fork `size` ranks that run `job`; their process numbers. Exit status 0, or that of the error, or 1."""
    port = free_port()
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            if not with_report:
                train.finish = lambda *_, **__: {}  # type: ignore[assignment]
            if size > 1:
                facts = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
                os.environ |= {key: str(value) for key, value in facts.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            # Until training catches it itself.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(BEFORE_TRAINING))
            job()
            status = 0
        except Interrupted as interrupted:
            status = interrupted.exit_status
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
            if os.environ.get("TRACEBACK"):
                traceback.print_exc()
        finally:
            os._exit(status)
    return children


def wait(children: list[int], seconds: float) -> list[int] | None:
    """Their exit statuses within `seconds`, negative for a signal; None if one of them goes on."""
    deadline = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    while True:
        for child in children:
            if child not in statuses:
                done = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if done is not None:
                    code = done.si_status
                    statuses[child] = code if done.si_code == os.CLD_EXITED else -code
        if len(statuses) == len(children):
            for child in children:
                os.waitpid(child, 0)
            return [statuses[child] for child in children]
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.0005)


def kill(children: list[int], number: int) -> None:
    """Send a signal to those that still are."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
