"""A bundle ready to answer: tokenizer, graph and task in one object, without torch or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.bundle import BundleInfo, read_info
from regraft.engine.errors import BundleError
from regraft.engine.graph_inputs import graph_inputs, graph_outputs
from regraft.engine.tasks import Prediction, Task, task_from_spec
from regraft.engine.threads import available_threads
from regraft.serve.groups import like_lengths
from regraft.serve.rows import load_bundled, prepare_rows
from regraft.serve.tokens import Encoded, Prepared, TextEncoder

if TYPE_CHECKING:
    import onnxruntime

# Empty cells that cost as much as one more run of the graph. In a packed graph an empty cell costs attention only; in
# a padded one it costs every layer.
SLACK = {"packed": 256, "padded": 32}
INPUTS = {
    "packed": ("input_ids", "position_ids", "pad_index", "token_index", "lengths"),
    "padded": ("input_ids", "attention_mask"),
}


class Session:
    """Answers encoded texts. `tokenize` may be called from any thread, `run` from one at a time.

    `threads`: intra-op threads of ONNX Runtime, by default this container's share. `providers`: ONNX Runtime's
    execution providers, by default CUDA where this ONNX Runtime has it and the CPU.
    Raises BundleError naming the file that is missing, was changed or cannot be run.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        *,
        warm_tokens: int = 1024,
    ) -> None:
        self.folder = Path(folder)
        self.info: BundleInfo = read_info(self.folder)
        if self.info.layout not in INPUTS:
            raise BundleError(
                f"{self.folder / 'bundle.json'}: layout {self.info.layout!r}; expected 'packed' or 'padded'"
            )
        for name in ("model.onnx", "tokenizer.json"):
            if not (self.folder / name).is_file():
                raise BundleError(f"{self.folder / name}: missing; export again")
        self.task: Task = task_from_spec(self.info.task)
        self.threads = threads or available_threads()
        self._encoder = TextEncoder(self.folder / "tokenizer.json", self.info.max_length)
        self._one_each = type(self.task).examples is Task.examples and type(self.task).answers is Task.answers
        self._tokenizer = None if self._one_each else load_bundled(self.folder, self.info)
        self._graph = _load_graph(self.folder / "model.onnx", self.threads, providers)
        self._check_inputs()
        self._slack = SLACK[self.info.layout]
        self.warm_up(warm_tokens)

    def tokenize(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> list[Encoded]:
        """Token ids of texts, or of pairs where `pairs` has a second text, cut to the model's `max_length`."""
        return self._encoder.encode(texts, pairs)

    def prepare(self, texts: Sequence[str], pairs: Sequence[Any] | None = None) -> Prepared:
        """The model's items for texts, each with what stands beside it; a text that cannot be read has a problem."""
        if self._one_each:
            items = self.tokenize(texts, pairs)
            problems = {i: item.problem for i, item in enumerate(items) if item.problem is not None}
            readable = [i for i in range(len(items)) if i not in problems]
            return Prepared(len(items), [items[i] for i in readable], readable, problems)
        beside = [None] * len(texts) if pairs is None else list(pairs)
        return prepare_rows(self.task, self._tokenizer, self.info.max_length, texts, beside)

    def answers(self, prepared: Prepared, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        """Answers for the inputs without a problem, from the outputs of all their items."""
        if prepared.examples is None:
            return self.decode(np.stack(outputs)) if len(outputs) else []
        return self.task.answers(prepared.examples, outputs)

    def run(self, items: Sequence[Encoded]) -> Sequence[np.ndarray]:
        """What the head gives for each item, in their order: logits [B, C] float32, or for a head that reads tokens
        one array [L, C] an item. Texts of like length go through the graph together."""
        lengths = np.array([item.tokens for item in items], dtype=np.int64)
        outputs: list[Any] = [None] * len(items)
        for group in like_lengths(lengths, self._slack):
            ids, types = [items[i].ids for i in group], [items[i].types for i in group]
            marks = [_marks(items[i]) for i in group] if self.info.reads == "marked" else None
            adapters = np.array([items[i].adapter for i in group], dtype=np.int64)
            logits = self._graph.run(["logits"], graph_inputs(self.info, ids, types, marks, adapters))[0]
            for i, found in zip(group, graph_outputs(self.info, logits, ids, marks), strict=True):
                outputs[i] = found
        return np.stack(outputs) if self.info.reads == "first" else outputs  # type: ignore[return-value]

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        """Answers for logits [B, C]: the activation and thresholds are the task's."""
        return self.task.decode(logits)

    @property
    def providers(self) -> list[str]:
        return self._graph.get_providers()

    def probe(self) -> Encoded:
        """A short sentence that the model must always be able to answer."""
        item = self.tokenize(["ready"])[0]
        return replace(item, marks=np.zeros(1, dtype=np.int64)) if self.info.reads == "marked" else item

    def warm_up(self, tokens: int) -> None:
        """Run a few shapes, the largest first, so that memory is reserved once and the first request is not slow."""
        ids, longest = self.probe().ids, self.info.max_length
        full = max(1, tokens // longest)
        for lengths in ([longest] * full, [8] * max(1, tokens // 8), [longest, 1], [1], [16]):
            items = [Encoded(np.resize(ids, n), np.zeros(n, dtype=np.int64)) for n in lengths]
            try:
                self.run(items)
            except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
                shape = f"{len(lengths)} texts of up to {max(lengths)} tokens"
                raise BundleError(f"{self.folder / 'model.onnx'}: cannot answer {shape}: {error}") from None

    def _check_inputs(self) -> None:
        found = sorted(i.name for i in self._graph.get_inputs())
        marked = self.info.reads == "marked" and self.info.layout == "packed"
        more = (
            *(("token_type_ids",) if self.info.token_types else ()),
            *(("marks",) if marked else ()),
            *(("adapter",) if self.info.adapters else ()),
        )
        expected = sorted((*INPUTS[self.info.layout], *more))
        outputs = [o.name for o in self._graph.get_outputs()]
        if found != expected or "logits" not in outputs:
            raise BundleError(
                f"{self.folder / 'model.onnx'}: inputs {found}, outputs {outputs}; "
                f"the {self.info.layout} layout has inputs {expected}, output ['logits']"
            )


def _marks(item: Encoded) -> np.ndarray:
    return np.zeros(1, dtype=np.int64) if item.marks is None else item.marks


def _load_graph(path: Path, threads: int, providers: Sequence[str] | None) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime as ort
    except ImportError:
        raise BundleError(
            f"{path}: serving needs onnxruntime: pip install 'regraft[cpu]' (or 'regraft[gpu]')"
        ) from None
    options: Any = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # A plan of memory is kept for every shape that was ever seen; shapes here never end.
    options.enable_mem_pattern = False
    # Threads that wait by spinning take the cores from tokenising and HTTP: on two shared cores MiniLM answers 1.6 times
    # as many tokens a second without it, for 0.6 of the CPU time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # its errors come as exceptions, and are told there
    if providers is None:
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in ort.get_available_providers()]
    try:
        return ort.InferenceSession(str(path), sess_options=options, providers=list(providers))
    except Exception as error:
        raise BundleError(f"{path}: ONNX Runtime cannot load it: {error}") from None
