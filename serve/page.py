"""The page at `/`: what is served here and how to ask it. One file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

from regraft.engine.bundle import BundleInfo
from regraft.engine.tasks import Task

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Regraft endpoint</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; color: #1d2630 }}
pre {{ background: #f2f4f6; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px }}
td {{ padding: .15rem 1.2rem .15rem 0; vertical-align: top }}
</style></head><body>
<h1>Regraft endpoint</h1>
<table>{rows}</table>
<h2>Ask</h2>
<pre>curl -s $URL/predict -H 'content-type: application/json' -d '{{"inputs": "a text"{adapter}}}'
curl -s $URL/predict -H 'content-type: application/json' -d '{{"inputs": {{"text": "one", "text_pair": "other"}}{adapter}}}'
curl -s $URL/predict -H 'content-type: application/json' -d '{{"inputs": ["a text", "another"], "top_k": 3{adapter}}}'</pre>
<p><a href="docs">OpenAPI page</a> · <a href="openapi.json">openapi.json</a> · <a href="metadata">metadata</a> ·
<a href="ready">ready</a> · <a href="health">health</a></p>
</body></html>
"""


def info_page(info: BundleInfo, task: Task) -> str:
    """The page as HTML."""
    shown = {
        "task": task.type,
        "labels": ", ".join(task.labels),
        **({"adapters": ", ".join(info.adapters)} if info.adapters else {}),
        "layout": f"{info.layout}, {info.precision}",
        "longest text": f"{info.max_length} tokens",
        **{key: str(value) for key, value in info.source.items() if isinstance(value, str | int | float)},
    }
    adapter = f', "adapter": "{escape(info.adapters[0])}"' if info.adapters else ""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in shown.items())
    return PAGE.format(rows=rows, adapter=adapter)
