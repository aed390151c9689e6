"""Weights, gradients and moments in equal parts on all processes: FSDP2 (Zhao et al. 2023), layer by layer.

On an accelerator accelerate does the wrapping; on a CPU, where accelerate has none, the same units are made with torch's
`fully_shard`. A layer is put together for its own forward and backward and taken apart again. The optimizer, clipping
and averaged weights work on plain tensors, each process on its own parts, so that they are the same code and the same
fused kernels as in one process. What is written is whole: any number of processes, sharded or not, goes on from it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ConfigError, ModelError
from regraft.engine.training.together import limit_waiting, machines, processes

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.methods.adapt import Adaptation
    from regraft.engine.models import RunningModel
    from regraft.engine.tasks import Task
    from regraft.engine.training.zero import Zero


def is_shared_out(config: RunConfig) -> bool:
    """Whether the configuration asks for shards and a launcher started this process, if only this one."""
    return config.training.sharding != "none" and "RANK" in os.environ


def stage_of(config: RunConfig) -> int:
    """Of DeepSpeed's ZeRO: 1, 2 or 3; 0 where the run is not under it."""
    return int(config.training.sharding[-1]) if is_shared_out(config) and by_deepspeed(config) else 0


def by_deepspeed(config: RunConfig) -> bool:
    return config.training.sharding.startswith("zero")


def accelerate_options(config: RunConfig) -> dict[str, Any]:
    """What accelerate's Accelerator is made with for a run whose weights are shared out on accelerators."""
    if not is_shared_out(config) or stage_of(config) or not torch.cuda.is_available():
        return {}
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.parallelism_config import ParallelismConfig
    from torch.distributed.fsdp import MixedPrecisionPolicy

    options: dict[str, Any] = {
        "fsdp_plugin": FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[],  # known when the model is
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
            # Nothing is cast by FSDP: products run in bf16 by autocast, as without shards.
            mixed_precision_policy=MixedPrecisionPolicy(),
        )
    }
    replicas = machines(config.training.sharding)
    if 1 < replicas < processes():
        options["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=replicas, dp_shard_size=processes() // replicas
        )
    return options


def attach_to_shards(model: Any, task: Task) -> None:
    """Attach the task's own parameters. Raises ModelError where there are any: its loss reads them beside the model."""
    before = sum(1 for _ in model.parameters())
    task.attach(model)
    if sum(1 for _ in model.parameters()) != before:
        raise ModelError(
            f"training.sharding: task.type: {task.type} has parameters of its own that its loss reads beside the model "
            "(a CRF's scores), which shards do not allow; use sharding: none"
        )


class Shards:
    """A model that is shared out, as its optimizer sees it.

    `parameters`: this process's part of each parameter that is trained, plain tensors that share their memory with the
    shards. `wholes`: the same as torch's DTensors, in the same order.
    """

    def __init__(self, running: Any, optimizer: torch.optim.Optimizer) -> None:
        self.running = self.model = running
        self.optimizer = optimizer
        self.wholes: list[Any] = [p for p in running.parameters() if p.requires_grad]
        self.parameters = [nn.Parameter(_part(p)) for p in self.wholes]
        own = {id(w): part for w, part in zip(self.wholes, self.parameters, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [own[id(p)] for p in group["params"]]
        self._part_of = own
        self._of = {id(part): w for w, part in zip(self.wholes, self.parameters, strict=True)}
        mesh = self.wholes[0].device_mesh
        self._group = mesh.get_group(mesh.ndim - 1)

    def part_of(self, whole: Tensor) -> Tensor:
        """This process's plain part of a DTensor."""
        return self._part_of[id(whole)]

    def bring_gradients(self) -> None:
        """Let the parts have this step's gradients."""
        for whole, part in zip(self.wholes, self.parameters, strict=True):
            part.data = _part(whole)  # the first forward may have put it elsewhere
            part.grad = None if whole.grad is None else whole.grad.to_local()

    def clear(self) -> None:
        for whole in self.wholes:
            whole.grad = None

    def whole_norm(self, norm: Tensor) -> Tensor:
        """L2 norm over all parts, from that of the parts here."""
        squares = norm.double().square()
        torch.distributed.all_reduce(squares, group=self._group)
        return squares.sqrt().float()

    @torch.no_grad()
    def joined(self, part: Tensor, like: Tensor, *, held: bool) -> Tensor:
        """The whole tensor, on the host, from its parts; empty for a process that does not hold it, but takes part.
        `like`: the part of `parameters` that it belongs to."""
        from torch.distributed.tensor import DTensor

        whole = self._of[id(like)]
        full = DTensor.from_local(
            part.detach().to(whole.device),
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        ).full_tensor()
        return full.cpu() if held else full.new_empty(0)

    def whole_state(
        self, weights: dict[str, Any], state: dict[str, Any], optimizer: Any, *, held: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A checkpoint as one process would write it, from what the processes have of `weights` and `state`."""
        whole = {n: self.joined(self.part_of(w), self.part_of(w), held=held) for n, w in weights.items()}
        moments = _each_moment(state["optimizer"], optimizer, lambda t, like: self.joined(t, like, held=held))
        joined = {**state, "optimizer": moments}
        if "averaged" in state:
            parts = zip(state["averaged"], self.parameters, strict=True)
            joined["averaged"] = [self.joined(average, like, held=held) for average, like in parts]
        return whole, joined

    def own_state(
        self, weights: dict[str, Tensor], state: dict[str, Any], into: dict[str, Any], optimizer: Any
    ) -> dict[str, Any]:
        """Take this process's part of a checkpoint: of `weights` into the model, the rest as it is returned."""
        put(weights, into)
        own = {**state, "optimizer": _each_moment(state["optimizer"], optimizer, self._cut)}
        if "averaged" in state:
            own["averaged"] = [self._cut(t, like) for t, like in zip(state["averaged"], self.parameters, strict=True)]
        return own

    def put(self, values: Mapping[str, Tensor], into: Mapping[str, Any]) -> None:
        """Copy this process's parts of whole tensors into the model."""
        put(values, into)

    def _cut(self, whole: Tensor, like: Tensor) -> Tensor:
        return own_part(whole, self._of[id(like)]).clone()  # no view that would hold on to the whole

    @contextmanager
    def whole(self, *, held: bool) -> Iterator[None]:
        """Within the block the model of a process that `held` is plain and whole, on the host, so that it can be saved as
        any other; the others only help to put it together. Every process has to enter."""
        places = [
            (module, name, weight)
            for module in self.running.modules()
            for name, weight in module._parameters.items()
            if hasattr(weight, "full_tensor")
        ]
        joined: dict[int, nn.Parameter] = {}
        with torch.no_grad():
            for _, _, weight in places:
                if id(weight) in joined:
                    continue
                full = weight.full_tensor().detach()
                joined[id(weight)] = nn.Parameter(full.cpu() if held else full.new_empty(0), weight.requires_grad)
        try:
            if held:
                for module, name, weight in places:
                    module._parameters[name] = joined[id(weight)]
            yield
        finally:
            if held:
                for module, name, weight in places:
                    module._parameters[name] = weight


def share_out(
    running: RunningModel, optimizer: torch.optim.Optimizer, accelerator: Any, config: RunConfig
) -> Shards | Zero:
    """Share the model's weights out among the processes and give the optimizer the parts that are this one's."""
    if accelerator.scaler is not None:
        raise ConfigError(
            "training.sharding: this GPU has no bf16, and fp16 scales its loss, which shards do not do alike; set "
            "training.precision: fp32"
        )
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # none is changed in place
    running.vocabulary_head = None  # held back, it would be read beside the model
    accelerator.prepare_model(running, evaluation_mode=True)  # autocast alone
    if stage_of(config):
        from regraft.engine.training.zero import Zero

        return Zero(running, optimizer, config)
    units = _layers(running.model)
    if next(running.parameters()).device.type != "cpu":
        names = sorted({type(unit).__name__ for unit in units})
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
        accelerator.prepare(running, optimizer)
    else:
        _share_out_on_cpu(running, units, optimizer, machines(config.training.sharding))
    # The root's weights are taken apart after a forward too: left whole, an evaluation would leave a copy behind that
    # the optimizer, or a swap with the averaged weights, does not reach.
    running.set_reshard_after_forward(True)  # type: ignore[operator]
    running.runs_in_step = True
    shards = Shards(running, optimizer)
    mesh = shards.wholes[0].device_mesh
    for dimension in range(mesh.ndim):
        limit_waiting(config.training.timeout, mesh.get_group(dimension))
    return shards


def _share_out_on_cpu(running: Any, units: list[nn.Module], optimizer: torch.optim.Optimizer, replicas: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if replicas > 1:
        shape, names = (replicas, processes() // replicas), ("replicate", "shard")
    else:
        shape, names = (processes(),), ("shard",)  # type: ignore[assignment]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    called = {id(p): name for name, p in running.named_parameters()}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(running, mesh=mesh, reshard_after_forward=True)
    shared = dict(running.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shared[called[id(p)]] for p in group["params"]]


def _layers(model: Any) -> list[nn.Module]:
    """The layers of the backbone; none where they share their weights (ALBERT): then the model is one unit."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    return []


def _each_moment(state: dict[str, Any], optimizer: Any, change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """An optimizer's state with every moment changed; `change(moment, parameter)`. Counts of steps stay as they are."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {key: change(v, order[number]) if v.dim() else v for key, v in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _part(whole: Any) -> Tensor:
    with torch.no_grad():
        return whole.to_local().detach()


def own_part(whole: Tensor, shared: Any) -> Tensor:
    """The rows of a whole tensor that this process holds of the DTensor `shared`."""
    mesh = shared.device_mesh
    pieces = whole.chunk(mesh.size(mesh.ndim - 1), dim=0)
    number = mesh.get_local_rank(mesh.ndim - 1)
    return pieces[number] if number < len(pieces) else whole[:0]


@torch.no_grad()
def put(values: Mapping[str, Tensor], into: Mapping[str, Any]) -> None:
    """Copy whole tensors into those of the same name, plain or shared out; names that are not there are passed over."""
    for name, value in values.items():
        target = into.get(name)
        if target is None:
            continue
        if hasattr(target, "to_local"):
            target.to_local().copy_(own_part(value, target))
        else:
            target.copy_(value)


def saved_tensors(adaptation: Adaptation) -> dict[str, Tensor]:
    """The model's tensors by the names they are saved under."""
    model = adaptation.model
    if adaptation.peft is None:
        return dict(model.named_parameters()) | dict(model.named_buffers())
    from peft import get_peft_model_state_dict

    own = dict(adaptation.peft.named_parameters())
    return get_peft_model_state_dict(adaptation.peft, state_dict=own, save_embedding_layers=False)
