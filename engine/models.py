"""Transformers' own modules, run packed: attention replaced through the attention interface, the head fed by a hook.

Parameters, state dict and `save_pretrained` stay as transformers made them. What runs packed was shown to give the
padded path's numbers when it was loaded; what cannot runs padded, and says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from regraft.engine.binding import PROOF_TOLERANCE, in_full_precision
from regraft.engine.errors import ModelError
from regraft.engine.methods.virtual import Prefix, PrefixedState, Prompt, virtual_tokens
from regraft.engine.output_scale import OutputScale
from regraft.engine.packing import PackedBatch, pack
from regraft.kernels.attention import plan_layout

if TYPE_CHECKING:
    from regraft.engine.vocabulary_head import VocabularyHead

ATTENTION = "regraft_packed"


@dataclass
class PackedState:
    """The batch that is running, as the attention modules of one model see it: a `Layout`, or a `GraphLayout` while
    the model is being exported. `marks` [M]: the rows that the head reads, where it reads marked ones."""

    layout: Any = None
    marks: Tensor | None = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a packed row. Shape: [1, H, T, D] each -> [1, T, H, D]."""
    layout = module.regraft_state.layout
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # transformers hands over window + 1 to mean "at most `window` positions away".
    window = None if sliding_window is None else sliding_window - 1
    out = layout.attend(q, k, v, scale=scale, dropout_p=dropout if module.training else 0.0, window=window)
    return out.unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register_attention() -> None:
    """Make the packed attention known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


def last_layer(model: Any) -> nn.Module | None:
    """The module whose output is the last layer's hidden states [1, T, H]; None where it cannot be told."""
    backbone = model.base_model
    depth = getattr(model.config, "num_hidden_layers", None)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and hasattr(module[-1], "forward"):
            return module[-1]
    return getattr(backbone, "encoder", None)  # ALBERT: layers share their weights


class RunningModel(nn.Module):
    """A transformers model with a head that takes a PackedBatch and gives logits.

    `reads`: which rows of hidden states the head is given: the 'first' of each sequence (logits [B, C]), all 'tokens'
    ([T, C]), or the batch's marked ones ([M, C]). Start and end logits of an answer come as two columns.
    `packed` tells how it runs; `reason` why it does not run packed, else "".
    """

    model: Any  # transformers' classes share no useful type

    def __init__(self, model: nn.Module, *, pad_token_id: int, reads: str = "first") -> None:
        super().__init__()
        self.model = model
        self.reads = reads
        self.pad_token_id = pad_token_id
        self.position_offset = 0
        self.runs_in_step = False  # with other processes, batch for batch, as weights that are shared out want it
        self.packed = False
        self.reason = ""
        self.bound: dict[str, int] = {}  # fused modules of each kind, where they are bound
        self.output_scale: OutputScale | None = None
        self.vocabulary_head: VocabularyHead | None = None
        self.virtual = virtual_tokens(model)
        self._state = PackedState()
        self._parameters_taken = set(inspect.signature(getattr(model, "backbone", model).forward).parameters)
        self._handles: list[Any] = []
        self._first_rows_only = False
        self._padded_attention = getattr(model.config, "_attn_implementation", None) or "sdpa"

    @property
    def places_before(self) -> int:
        """How many positions a prefix takes up; a prompt's are counted with the texts."""
        return self.virtual.count if isinstance(self.virtual, Prefix) else 0

    @property
    def uses_token_types(self) -> bool:
        return "token_type_ids" in self._parameters_taken and getattr(self.model.config, "type_vocab_size", 0) > 1

    def forward(self, batch: PackedBatch) -> Any:
        rows = None
        if isinstance(self.virtual, Prompt):
            batch, rows = self.virtual.before(batch)
        run = self._forward_packed if self.packed else self._forward_padded
        head = self.vocabulary_head
        if head is not None and self.training and torch.is_grad_enabled():
            with head.holding():
                found: Any = run(batch)
            paired = isinstance(found, PairedLogits)
            return PairedLogits(head.rows(found.tokens), found.pairs) if paired else head.rows(found)
        logits = run(batch)
        if rows is not None and self.reads == "tokens":
            logits = logits.index_select(0, rows)
        return logits if self.output_scale is None else self.output_scale(logits)

    def _forward_packed(self, batch: PackedBatch) -> Tensor:
        types = batch.token_type_ids
        if self.uses_token_types and types is None:
            types = torch.zeros_like(batch.input_ids)
        layout = self.layout_of(batch)
        positions = batch.position_ids + self.position_offset
        return self.run_layout(layout, batch.input_ids, positions, types, batch.marks)

    def layout_of(self, batch: PackedBatch) -> Any:
        """How the batch's sequences are attended; `bind_fused` puts another in its place."""
        return plan_layout(batch.lengths, batch.cu_seqlens)

    def run_layout(
        self,
        layout: Any,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        marks: Tensor | None = None,
    ) -> Tensor:
        """The packed forward over any layout that can attend. Shape: [T] each, marks [M] -> logits as `reads` says."""
        self._state.layout, self._state.marks = layout, marks
        inputs: dict[str, Tensor] = {"input_ids": input_ids[None]}
        if "position_ids" in self._parameters_taken:
            inputs["position_ids"] = position_ids[None]
        if self.uses_token_types and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids[None]
        logits: Any = logits_of(self.model(**inputs))
        if isinstance(logits, PairedLogits):
            return cast("Tensor", PairedLogits(logits.tokens[0], logits.pairs))
        return logits if self.reads == "first" else logits[0]

    def _forward_padded(self, batch: PackedBatch) -> Tensor:
        shape = (batch.sequences, batch.max_seqlen)
        lengths = torch.as_tensor(batch.lengths, device=batch.input_ids.device)
        mask = torch.arange(shape[1], device=lengths.device)[None] < lengths[:, None]
        ids = torch.full(shape, self.pad_token_id, dtype=torch.int64, device=lengths.device)
        ids[mask] = batch.input_ids
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        if isinstance(self.virtual, Prefix):
            inputs["attention_mask"] = torch.nn.functional.pad(mask.long(), (self.virtual.count, 0), value=1)
            inputs["past_key_values"] = self.virtual.cache(batch.sequences)
        if self.uses_token_types:
            types = torch.zeros(shape, dtype=torch.int64, device=lengths.device)
            if batch.token_type_ids is not None:
                types[mask] = batch.token_type_ids
            inputs["token_type_ids"] = types
        logits: Any = logits_of(self.model(**inputs))
        if self.reads == "first":
            return logits
        if isinstance(logits, PairedLogits):
            return cast("Tensor", PairedLogits(_picked(logits.tokens[mask], batch.marks), logits.pairs))
        return _picked(logits[mask], batch.marks)

    def run_padded(self, reason: str) -> None:
        """Plain transformers on padded batches."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self.model.modules():
            if "forward" in vars(module):
                del module.forward  # what `use_kernels` bound
        vars(self).pop("layout_of", None)
        self.bound = {}
        self.vocabulary_head = None
        if self.model.config._attn_implementation == ATTENTION:
            self.model.set_attn_implementation(self._padded_attention)
        self.packed, self.reason = False, reason

    def run_packed(self) -> None:
        """Packed where a proof on random sequences succeeds; padded, with the reason, where it does not."""
        register_attention()
        try:
            proof = _Proof(self)
            self.model.set_attn_implementation(ATTENTION)
            if self.model.config._attn_implementation != ATTENTION:
                raise NotImplementedError("it has an attention of its own")
            self._install()
        except Exception as error:  # whatever a model of unknown make raises: it cannot run packed
            self.run_padded(f"{type(self.model).__name__} cannot be run packed ({_first_line(error)})")
            return
        self.packed = True
        worst = float("inf")
        pad = self.model.config.pad_token_id
        for offset in sorted({0, (pad if pad is not None else -1) + 1}, reverse=_numbers_from_padding(self.model)):
            self.position_offset = offset + self.places_before
            try:
                worst = proof.error()
            except Exception as error:
                self.run_padded(f"{type(self.model).__name__} failed on a packed row ({_first_line(error)})")
                return
            if worst <= PROOF_TOLERANCE:
                return
        self.run_padded(
            f"{type(self.model).__name__} mixes sequences when they are packed (error {worst:.1e}, allowed {PROOF_TOLERANCE:.0e})"
        )

    def run_packed_as(self, proven: RunningModel) -> None:
        """Packed without a proof of its own: the model is built like that of `proven`, which had one."""
        register_attention()
        self.model.set_attn_implementation(ATTENTION)
        self._install()
        self.packed, self.position_offset = True, proven.position_offset

    def use_kernels(self) -> None:
        """Bind the fast forwards on this model's instances; parameters stay."""
        from regraft.engine.fast import bind_dropout, bind_last_layer, bind_merged_projections, bind_rotary
        from regraft.engine.products import bind_products
        from regraft.engine.vocabulary_head import bind_vocabulary_head

        on_cpu = next(self.model.parameters()).device.type == "cpu"
        if on_cpu:
            bind_dropout(self.model)
            bind_products(self.model)
        if self.packed and on_cpu:
            from regraft.engine.fast_cpu import bind_native

            bind_native(self)
        if self.packed:
            if self._first_rows_only:
                bind_last_layer(self)
            bind_merged_projections(self)
            bind_rotary(self)
            if next(self.model.parameters()).device.type == "cuda" and self.virtual is None:
                from regraft.engine.fast_gpu import bind_fused

                bind_fused(self)
        self.vocabulary_head = bind_vocabulary_head(self)

    def _install(self) -> None:
        for module in self.model.modules():
            module.regraft_state = self._state
            if isinstance(self.virtual, Prefix) and isinstance(getattr(module, "layer_idx", None), int):
                module.regraft_state = PrefixedState(self._state, self.virtual, module.layer_idx)
        if self.reads != "first":
            self._install_marks()
            return
        if getattr(self.model, "keeps_all_rows", False):
            return
        if getattr(self.model.config, "classifier_pooling", "cls") == "mean":
            self._handles.append(self.model.base_model.register_forward_hook(self._mean_rows))
            return
        self._first_rows_only = True
        last = last_layer(self.model)
        if last is None:
            raise ModelError(f"{type(self.model).__name__}: its last layer was not found")
        self._handles.append(last.register_forward_hook(self._first_rows))

    def _first_rows(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        # Heads take `[:, 0]`: give them one row a sequence.
        starts = self._state.layout.starts
        return _replace_hidden(output, lambda hidden: hidden[0].index_select(0, starts)[:, None])

    def _install_marks(self) -> None:
        if self.reads != "marked":
            return
        base = self.model.base_model
        self._handles.append(base.register_forward_hook(self._marked_rows))
        if getattr(base, "pooler", None) is not None:  # takes `[:, 0]`
            self._handles.append(base.pooler.register_forward_pre_hook(self._pooled_rows))

    def _marked_rows(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        # Over a vocabulary the head costs more than the encoder: it gets the marked rows and no others.
        marks = self._state.marks
        return output if marks is None else _replace_hidden(output, lambda hidden: hidden.index_select(1, marks))

    def _pooled_rows(self, module: nn.Module, inputs: Any) -> Any:
        return (inputs[0][0].index_select(0, self._state.layout.starts)[:, None], *inputs[1:])

    def _mean_rows(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return _replace_hidden(output, lambda hidden: self._state.layout.means(hidden[0])[:, None])


class AroundBackbone(nn.Module):
    """What RunningModel asks of transformers' models, for modules of ours around one of their encoders."""

    base_model_prefix = "backbone"
    backbone: Any
    regraft_state: Any  # set by RunningModel: the layout of the batch that is running

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def base_model(self) -> nn.Module:
        return self.backbone

    def set_attn_implementation(self, name: str) -> None:
        self.backbone.set_attn_implementation(name)


def ready_to_answer(
    model: Any, pad_token_id: int, *, packing: str, kernels: str, reads: str = "first", device: str | None = None
) -> RunningModel:
    """A model that will not be trained: on its device, packed where it can be, with the fast forwards bound."""
    running = RunningModel(model, pad_token_id=pad_token_id, reads=reads)
    running.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    running.eval()
    if packing == "auto":
        running.run_packed()
    if kernels == "auto":
        running.use_kernels()
    return running


class PairedLogits(NamedTuple):
    """Logits of marked tokens [M, V] (or `HeldBack` rows) and of pairs of sentences [B, 2], as models for pre-training
    give them."""

    tokens: Any
    pairs: Tensor


def _picked(logits: Tensor, marks: Tensor | None) -> Tensor:
    return logits if marks is None else logits.index_select(0, marks)


def logits_of(output: Any) -> Any:
    """The head's logits; an answer's start and end as two columns; of a model for pre-training both kinds."""
    if "prediction_logits" in output:
        pairs = output.sop_logits if "sop_logits" in output else output.seq_relationship_logits
        return PairedLogits(output.prediction_logits, pairs)
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits


def _replace_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output["last_hidden_state"] = change(output["last_hidden_state"])
    return output


def _numbers_from_padding(model: Any) -> bool:
    # The RoBERTa family counts positions from padding_idx + 1.
    return any(hasattr(m, "create_position_ids_from_input_ids") for m in model.base_model.modules())


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


class _Proof:
    """A few random sequences, with the padded path's logits for them."""

    def __init__(self, running: RunningModel) -> None:
        self.running = running
        config = running.model.config
        limit = getattr(config, "max_position_embeddings", 512) or 512
        limit -= running.virtual.count if running.virtual else 0
        window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or 0
        lengths = [n for n in (7, 1, 23, 12, 12, min(limit - 4, 2 * window + 9)) if 0 < n < limit - 2]
        generator = torch.Generator().manual_seed(7)
        low = min(10, config.vocab_size - 1)
        ids = [torch.randint(low, config.vocab_size, (n,), generator=generator) for n in lengths]
        pad = running.pad_token_id
        ids = [torch.where(x == pad, (pad + 1) % config.vocab_size, x) for x in ids]
        device = next(running.model.parameters()).device
        marks = torch.arange(0, sum(lengths), 3).numpy() if running.reads == "marked" else None
        self.batch = pack([x.numpy() for x in ids], marks=marks).to(device)
        self.expected = self._logits()

    def _logits(self) -> Tensor:
        was_training = self.running.training
        self.running.eval()
        try:
            with torch.no_grad(), in_full_precision(self.running.model):
                found = self.running(self.batch)
                return torch.cat([x.double().flatten() for x in found]) if isinstance(found, tuple) else found.double()
        finally:
            self.running.train(was_training)

    def error(self) -> float:
        """Largest difference of a logit, as a share of the largest logit (not below 1)."""
        found = self._logits()
        if found.shape != self.expected.shape:
            return float("inf")
        scale = max(1.0, float(self.expected.abs().max()))
        return float((found - self.expected).abs().max()) / scale
