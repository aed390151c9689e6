"""Registers, shared memory, spills and load widths of every shipped kernel, compiled for sm_80 and sm_90 without a GPU.

Writes bench/results/kernels_static.json, prints the table. Needs Triton (with its own ptxas) and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it is read when Triton is imported
RESULT = Path(__file__).resolve().parent / "results" / "kernels_static.json"


def main() -> None:
    from regraft.kernels.shipped import Compiled, all_shipped, compile_for, fingerprint, one_each, parse_for, with_ones

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (%(default)s)")
    parser.add_argument("--only", default="", help="names that contain this; writes nothing without --out")
    parser.add_argument("--one-each", action="store_true", help="one configuration of every kernel; needs --out")
    parser.add_argument("--ones", action="store_true", help="only see that each integer argument can be 1")
    parser.add_argument("--fingerprint", action="store_true", help="only print the hash of what would be compiled")
    options = parser.parse_args()
    if options.fingerprint:
        print(fingerprint(all_shipped()))
        return
    cases = [case for case in all_shipped() if options.only in case.name]
    cases = one_each(cases) if options.one_each else cases
    if options.ones:
        check_ones([one for case in one_each(cases) for one in with_ones(case)], parse_for)
        return
    rows: list[Compiled] = []
    for case in cases:
        for target in case.targets:
            rows.append(compile_for(case, target))
            print(line(rows[-1]), file=sys.stderr, flush=True)
    faults = [f"{row.name} on sm_{row.target} spills {row.spills}" for row in rows if row.spills]
    wide = {case.name for case in cases if case.wide_loads}
    faults += [f"{r.name} on sm_{r.target} has no 128-bit load" for r in rows if r.name in wide and not r.loads_128]
    if options.out != RESULT or not (options.only or options.one_each):
        import triton

        result = {
            "name": "kernels_static",
            "command": "python bench/kernels_static.py",
            "triton": triton.__version__,
            "fingerprint": fingerprint(cases),
            "unit": "registers a thread, bytes of shared memory a block, spilling and 128-bit load instructions",
            "kernels": [asdict(row) for row in rows],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(faults) or f"{len(rows)} compilations: no spills, 128-bit loads where they belong")
    sys.exit(1 if faults else 0)


def check_ones(cases: Sequence[Any], parse: Callable[[Any, int], None]) -> None:
    faults = []
    for case in cases:
        try:
            parse(case, case.targets[-1])
        except Exception as error:
            faults.append(f"{case.name}: {error}")
    print("\n".join(faults) or f"{len(cases)} kernels take a 1")
    sys.exit(1 if faults else 0)


def line(row: object) -> str:
    return "  ".join(f"{key} {value}" for key, value in asdict(row).items())  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
