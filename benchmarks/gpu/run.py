"""The parts one after the other, each in a process of its own that may hang, crash or run out of memory.

Nothing here imports torch, but for a rehearsal: whatever a part does to the GPU, its line is written.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOG, WORK = "gpu.jsonl", "log.txt", "work"
DEADLINE = 470.0  # seconds of the whole
LEAST = 15.0  # seconds that a part is begun with
REHEARSAL_LIMIT = 120.0  # seconds of a part
REHEARSED_AT_ONCE = 2  # parts


@dataclass(frozen=True)
class Part:
    """A part and its time limit in seconds. reserve: seconds that are left for those after it."""

    name: str
    limit: float
    reserve: float = 0.0


PARTS = (
    Part("doctor", 45),
    Part("tests", 120),
    Part("inference", 100),
    Part("compiled", 100),
    Part("training", 45),
    Part("cifar", 215, reserve=70),
    Part("cores", 110),
)


def append(path: Path, values: dict[str, Any]) -> None:
    """A line of JSON that is on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines but one that was cut in its middle."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def environment(work: Path, rehearse: bool) -> dict[str, str]:
    """The variables of a part: whatever a library keeps or forgets somewhere comes into `work`."""
    folders = {
        name: str(work / "cache" / name.lower())
        for name in (
            "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR", "HF_HOME",
            "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH",
        )
    }  # fmt: skip
    folders["TMPDIR"] = str(work / "tmp")  # short: sockets are made in it, whose names may not be long
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else cuBLAS may not repeat its bits
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # an image may have many that this suite has never met
    }
    if sys.platform == "linux":  # without a network a machine may not find itself by its name
        settings |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if rehearse:
        settings |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | folders | settings


def facts(commit: str | None) -> dict[str, Any]:
    """What can be said of this machine and tree without torch; each part adds what torch says."""
    card = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    if commit is None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
            done = subprocess.run(describe, capture_output=True, text=True, timeout=20, check=True)
            commit = done.stdout.strip()
    return {
        "card": card,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


class Forked:
    """As `subprocess.Popen`, a fork of this process: a rehearsal would mostly wait for imports."""

    def __init__(self, job: Callable[[], object], variables: dict[str, str], output: BinaryIO) -> None:
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status: Any = 1
            try:
                os.setsid()
                os.environ.update(variables)
                for number in (1, 2):
                    os.dup2(output.fileno(), number)
                job()
                status = 0
            except SystemExit as ended:
                status = ended.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int | None:
        """The exit status, when it has ended."""
        while self.poll() is None:
            time.sleep(0.01)
        return self._status


def import_all(work: Path) -> Callable[[argparse.Namespace], object]:
    """Import what the parts of a rehearsal need; the function that measures one of them."""
    sys.dont_write_bytecode = True
    os.environ.update(environment(work, rehearse=True))
    import matplotlib.figure  # noqa: F401
    import timm  # noqa: F401
    import torch._dynamo  # noqa: F401  (optimizers bring it in)

    import mixlab.recipes  # noqa: F401
    from benchmarks.gpu.parts import measure

    return measure


class Running:
    """The process of a part that has begun."""

    def __init__(
        self,
        part: Part,
        options: argparse.Namespace,
        seconds: float,
        measure: Callable[[argparse.Namespace], object] | None = None,
    ) -> None:
        self.part, self.out, self.limit, self.began = part, options.out, seconds, time.monotonic()
        self.work = options.out / WORK / part.name
        self.work.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--out", str(options.out)]
        command += ["--seconds", str(seconds)] + (["--rehearse"] if options.rehearse else [])
        if options.cifar and part.name == "cifar":
            command += ["--cifar", *map(str, options.cifar)]
        variables = environment(self.work, options.rehearse)
        self.process: Forked | subprocess.Popen[bytes]
        with (options.out / LOG).open("ab") as log:
            log.write(f"\n=== {part.name}, at most {seconds:.0f} s\n".encode())
            log.flush()
            if measure is not None:
                given = argparse.Namespace(**vars(options) | {"part": part.name, "seconds": seconds})
                self.process = Forked(lambda: measure(given), variables, log)
                return
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None or self.seconds > self.limit

    def end(self, why: str = "") -> dict[str, Any]:
        """Kill what is left of it, children included; how it ended."""
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if status is None:  # a fork that has no group of its own yet has no children either
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.work, ignore_errors=True)
        mine = [line for line in read_lines(self.out / RESULTS) if line["part"] == self.part.name]
        found = {
            "part": self.part.name,
            "seconds": round(self.seconds, 1),
            "rows": sum("row" in line for line in mine),
        }
        errors = [line["error"] for line in mine if "error" in line]
        if status is None:
            return found | {"status": "cut", "error": why or f"it took longer than {self.limit:.0f} s"}
        if status != 0:
            return found | {"status": "failed", "error": (errors or [f"its process ended with {status}"])[-1]}
        skipped = [line["skipped"] for line in mine if "skipped" in line]
        if skipped:
            return found | {"status": "skipped", "why": skipped[-1]}
        return found | {"status": "done"}


def run(options: argparse.Namespace) -> int:
    """All parts; exit status 1 if one of them failed or was cut."""
    began = time.monotonic()
    options.out = options.out.absolute()
    options.cifar = [path.absolute() for path in options.cifar]
    results = options.out / RESULTS
    if results.exists():
        print(f"{results} is there already: give another --out", file=sys.stderr)
        return 2
    (options.out / WORK).mkdir(parents=True, exist_ok=True)
    known = facts(options.commit)
    waiting = [part for part in PARTS if options.parts is None or part.name in options.parts]
    if options.rehearse:  # several at a time, so the long ones, which are the last, come early
        waiting = waiting[:1] + waiting[:0:-1]
    running: list[Running] = []
    statuses = []

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def write(line: dict[str, Any]) -> None:
        for row in read_lines(results):
            known.update(row.get("facts", {}))
        statuses.append(line["status"])
        append(results, line | {"facts": known})
        said = line.get("error") or line.get("why") or ""
        print(
            f"{line['part']}: {line['status']}, {line['seconds']:.0f} s, {line['rows']} rows  {said}",
            flush=True,
        )

    signal.signal(signal.SIGTERM, stop)
    measure: Callable[[argparse.Namespace], object] | None = None
    at_once = REHEARSED_AT_ONCE if options.rehearse else 1
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                part = waiting.pop(0)
                left = options.seconds - (time.monotonic() - began) - part.reserve
                limit = REHEARSAL_LIMIT if options.rehearse else part.limit
                if left < LEAST:
                    why = f"{left:.0f} s were left for it"
                    write({"part": part.name, "seconds": 0.0, "rows": 0, "status": "skipped", "why": why})
                    continue
                running.append(Running(part, options, min(limit, left), measure))
                if (
                    options.rehearse and measure is None and waiting
                ):  # the first begins as all of a real run do
                    measure = import_all(options.out / WORK / "imports")
            for one in [one for one in running if one.is_over]:
                running.remove(one)
                write(one.end())
            time.sleep(0.05)
    except KeyboardInterrupt:
        for one in running:
            write(one.end("the whole run was stopped"))
        statuses.append("cut")
    finally:
        shutil.rmtree(options.out / WORK, ignore_errors=True)
    print(f"{time.monotonic() - began:.0f} s; {results}")
    return 0 if {"done", "skipped"}.issuperset(statuses) else 1
