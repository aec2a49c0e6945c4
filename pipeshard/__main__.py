"""The command line: `pipeshard`, or `python -m pipeshard`. Errors are one line and an exit status: 1 where something
failed, 2 where the command was wrong, 130 after Ctrl-C.

Not here: what the commands do (cli/, synth.py). Threads: none.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from .errors import PipeshardError, RequestError


def version_text() -> str:
    """The version, what was compiled in, and what of it was found here."""
    from . import _core

    info = _core.build_info()
    archs = f" (sm {info['cuda_archs']})" if info["cuda_archs"] else ""
    available, why = _core.cuda_status()
    return (
        f"pipeshard {info['version']}\n"
        f"devices: {', '.join(info['devices'])}{archs}\n"
        f"CUDA here: {'yes' if available else 'no: ' + why}\n"
        f"CPU variants: {', '.join(info['cpu_variants'])}"
        f" (this CPU runs: {', '.join(info['cpu_variants_here'])})\n"
        f"CPUs: {_core.cpu_count()}\n"
        f"compiler: {info['compiler']}"
    )


def make_parser() -> argparse.ArgumentParser:
    from . import synth
    from .cli import bench, chat, info, plan, profile, run, sweep

    parser = argparse.ArgumentParser(prog="pipeshard", description=sys.modules[__package__].__doc__)
    parser.add_argument("--version", action="store_true", help="what is compiled in and was found")
    parser.set_defaults(run=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (run, chat, info, plan, bench, profile, sweep, synth):
        command.add_parser(subparsers)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(args)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(parser, options)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        if options.version:
            print(version_text())
            return 0
        if options.run is None:
            parser.print_usage(sys.stderr)
            return 2
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except RequestError as error:
        return _fail(str(error), 2)
    except PipeshardError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read us has gone; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(text: str, status: int) -> int:
    print(f"pipeshard: {' '.join(text.split())}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _fail(f"warning: {message}", 0)


if __name__ == "__main__":
    sys.exit(main())
