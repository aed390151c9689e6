"""`regraft merge`: its arguments."""

from __future__ import annotations

import argparse
import math
from typing import Any

MAX_DRIFT = 1e-3


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("merge", help="work an adapter into its backbone; a plain Hugging Face model folder")
    parser.add_argument("model", help="run folder or adapter folder")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--data", metavar="FILE", help="rows to compare on; default: the run's dev rows")
    parser.add_argument(
        "--max-drift",
        type=_share,
        default=MAX_DRIFT,
        metavar="SHARE",
        help="largest difference of a logit, as a share of the largest logit (%(default)s)",
    )
    parser.set_defaults(handler=_merge)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share of 0 or more, such as {MAX_DRIFT}")
    return share


def _merge(args: argparse.Namespace) -> int:
    from regraft.engine.methods.merge import merge

    print(merge(args.model, args.to, data_file=args.data, max_drift=args.max_drift))
    return 0
