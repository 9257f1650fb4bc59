"""The command: `python -m benchmarks.gpu`."""

import argparse
import sys
from pathlib import Path

import benchmarks.gpu
from benchmarks.gpu.run import DEADLINE, PARTS, run

SHORT = 60  # seconds: less than this is no time for anything


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=benchmarks.gpu.__doc__,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="where gpu.jsonl and log.txt are written")
    parser.add_argument("--cifar", type=Path, nargs="+", default=[], help="class folders, or zips of them")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--seconds", type=float, default=DEADLINE, help="of the whole")
    parser.add_argument("--commit", help="what the tree is, where git cannot say it")
    parser.add_argument("--rehearse", action="store_true", help="all in tiny on a CPU")
    parser.add_argument("--pack-cifar", nargs=2, metavar=("SOURCE", "OUT"), help="half the training images")
    parser.add_argument("--half", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--draw", nargs=2, type=Path, metavar=("FILE", "FOLDER"), help="figures of a gpu.jsonl"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the process of one part
    options = parser.parse_args(arguments)
    if options.pack_cifar:
        from benchmarks.gpu.pictures import pack

        print(pack(options.pack_cifar[0], Path(options.pack_cifar[1]), options.half))
        return 0
    if options.draw:
        from benchmarks.gpu.figure import draw

        for path in draw(*options.draw):
            print(path)
        return 0
    if options.out is None:
        parser.error("--out DIR says where the results are written")
    if options.part:
        from benchmarks.gpu.parts import measure

        measure(options)
        return 0
    for path in options.cifar:
        if not path.exists():
            parser.error(f"--cifar: there is no {path}")
    if options.seconds < SHORT:
        parser.error(f"--seconds: {options.seconds:.0f} s are too few, give {SHORT} or more")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
