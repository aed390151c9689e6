"""What `regraft plan` says of one run, before anything else has used memory in this process.

The argument is one JSON object, the last line printed is one. Keys: config (a run's configuration), folder (for it).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    spec = json.loads(sys.argv[1])

    from regraft.engine.config import load_config
    from regraft.engine.methods.plan import plan_run

    path = Path(spec["folder"]) / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec["config"], indent=1), encoding="utf-8")  # JSON is YAML
    found = plan_run(load_config(path), alternatives=False)
    chosen = found.chosen
    record = {"peak_bytes": chosen.memory.peak, "memory": asdict(chosen.memory), "available": found.available}
    print(json.dumps(record | {"trained": chosen.trained, "total": chosen.total, "fits": found.fits}))


if __name__ == "__main__":
    main()
