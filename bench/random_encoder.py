"""An encoder of a published size with random weights, for speed and memory: numbers cost the same whatever they are.

The argument is one JSON object, the last line printed is one. Keys: name, tokenizer (a model folder to take it from),
folder (to write).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# As published; the vocabulary is the tokenizer's, so that every id that is read has a row.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT-base": ("Bert", {}),
    "BERT-large": (
        "Bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "ModernBERT-base": (
        "ModernBert",
        {"pad_token_id": 0, "bos_token_id": 101, "cls_token_id": 101, "eos_token_id": 102, "sep_token_id": 102},
    ),
}


def main() -> None:
    spec = json.loads(sys.argv[1])

    import torch
    import transformers

    folder = Path(spec["folder"])
    kind, settings = SIZES[spec["name"]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["tokenizer"])
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}Model")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
