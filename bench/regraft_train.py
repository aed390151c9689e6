"""One training run of Regraft: its speed over a window of steps, or what it ends with.

The argument is one JSON object, the last line printed is one. Keys: config (a run's configuration), folder (an empty
one for it), and for speed warmup_steps and window_steps.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    spec = json.loads(sys.argv[1])

    from regraft.engine.config import load_config
    from regraft.engine.training.run import train

    ended: list[float] = []
    tokens: list[int] = []

    def on_step(info: Any) -> None:
        ended.append(time.perf_counter())
        tokens.append(info.tokens)

    path = Path(spec["folder"]) / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec["config"], indent=1), encoding="utf-8")  # JSON is YAML
    result = train(load_config(path), on_step=on_step, quiet=True)
    found: dict[str, Any] = {"run_seconds": result.seconds, "metrics": result.metrics, "best_step": result.best_step}
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if "window_steps" in spec:
        first, last = spec["warmup_steps"], spec["warmup_steps"] + spec["window_steps"]
        found |= {
            "tokens": sum(tokens[first:last]),
            "seconds": ended[last - 1] - ended[first - 1],
            "steps": last - first,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
