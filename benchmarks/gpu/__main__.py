"""python -m benchmarks.gpu probe | report | render"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import machine
from ..results import RESULTS
from . import probe
from .driver import absent

_NO_GPU = 2
_REPORT_S = 540.0
_PAGE = machine.ROOT / "docs" / "gpu.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 where there is no GPU to measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, seconds in (
        ("probe", "ask the driver what the design leans on", probe.SECONDS_MAX),
        ("report", "measure what a save costs, beside the peers", _REPORT_S),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--out", type=Path, required=True, help="directory for the JSON")
        command.add_argument("--dir", type=Path, help="scratch, on the disk to measure")
        command.add_argument("--seconds-max", type=float, default=seconds, help="end by then")
        if name == "probe":
            numbers = ", ".join(f"{number} {one}" for number, one in probe.PROBES.items())
            command.add_argument(
                "--only", type=int, nargs="+", choices=probe.PROBES, default=(), help=f"of {numbers}"
            )
        else:
            command.add_argument("--resume", action="store_true", help="measure what an earlier run lacks")
            command.add_argument("--tiny", action="store_true", help="does it run? The figures mean nothing")
    command = commands.add_parser("render", help="the page of the results: docs/gpu.md")
    command.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON")
    command.add_argument("--out", type=Path, default=_PAGE)
    given = parser.parse_args(arguments)
    if given.command == "render":
        from .render import render

        render(given.results, given.out)
        print(given.out)
        return 0
    if given.command == "report" and given.tiny and _is_for_results(given.out):
        parser.error("a tiny run never goes where the results of full ones are: give another --out")
    if (reason := absent()) is not None:
        sys.stderr.write(f"no GPU to measure here: {reason}. Nothing was written.\n")
        return _NO_GPU
    if given.command == "probe":
        print(probe.run(given.out.resolve(), given.dir, given.only, given.seconds_max))
    else:
        from . import report  # the probes need no product: not even one that is built

        print(
            report.run(
                given.out.resolve(), given.dir, given.seconds_max, tiny=given.tiny, resume=given.resume
            )
        )
    return 0


def _is_for_results(out: Path) -> bool:
    return out.resolve() == RESULTS


if __name__ == "__main__":
    sys.exit(main())
