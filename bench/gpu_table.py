"""What `make bench-gpu` measured, in a short table: kernels beside their best rival, steps beside Trainer's."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    for name, lines in (("kernels_gpu", kernel_lines), ("train_gpu", step_lines)):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{name}: not yet measured")
            continue
        print("\n".join(lines(json.loads(path.read_text(encoding="utf-8")))))


def kernel_lines(result: dict[str, Any]) -> list[str]:
    """Milliseconds of a kernel, its share of the ceiling, and how many times faster it is than the best of the others."""
    groups: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in result["rows"]:
        groups[row["name"], row["shape"], row["direction"]][row["who"]] = row
    lines = [f"{'kernel':32}{'shape':30}{'':10}{'ms':>9}{'ceiling':>9}  beside the best other"]
    for (name, shape, direction), by_who in groups.items():
        ours = by_who.pop("regraft", None)
        if ours is None:
            continue
        best = min(by_who.values(), key=lambda r: r["milliseconds"], default=None)
        other = f"{best['milliseconds'] / ours['milliseconds']:.2f}x {best['who']}" if best else ""
        lines.append(f"{name:32}{shape:30}{direction:10}{ours['milliseconds']:9.4f}{ours['share']:9.0%}  {other}")
    return lines


def step_lines(result: dict[str, Any]) -> list[str]:
    """Tokens a second of whole steps, and the ratios to Trainer."""
    lines = [f"{'case':36}{'tokens/s':>12}{'ceiling':>9}  Trainer as it comes, at its best"]
    for name, case in result["cases"].items():
        ours = next((run for run in case["runs"] if run["who"] == "regraft"), None)
        if ours is None:
            lines.append(
                f"{name:36} failed or left out: {case['settings'].get('failed', {}).get('regraft', '')[-120:]}"
            )
            continue
        share = ours["details"].get("matrix_share") or 0.0
        ratios = ", ".join(
            f"{case['ratios'][who]:.2f}x" for who in ("trainer", "trainer-best") if who in case["ratios"]
        )
        lines.append(f"{name:36}{ours['value']:12,.0f}{share:9.0%}  {ratios}")
    return lines


if __name__ == "__main__":
    main()
