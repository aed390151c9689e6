"""`method: frozen`: the recipe of training over stored features instead of texts. Loop, resume and report are the same."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from regraft.engine.config import TrainingConfig
from regraft.engine.data.rows import Rows
from regraft.engine.fast import bind_dropout
from regraft.engine.features.extract import features_of
from regraft.engine.features.rows import FeatureRows
from regraft.engine.features.sources import parts_of
from regraft.engine.features.spec import feature_spec, model_folder
from regraft.engine.heads.adamw import FusedAdamW
from regraft.engine.heads.fits import check_descriptions, check_head
from regraft.engine.heads.fitted import describe, fit, import_solver
from regraft.engine.heads.head import ON_THE_SPHERE, Head, build_head
from regraft.engine.heads.local import LocalProcess
from regraft.engine.heads.model import save_grafted, save_head
from regraft.engine.heads.order import RANDOM_BELOW
from regraft.engine.heads.settings import SOLVED
from regraft.engine.heads.step import FeatureHead, HeadStepper, block_plan
from regraft.engine.tasks.base import TOKENS
from regraft.engine.training.optimizer import AveragedWeights, build_optimizer, parameter_groups
from regraft.engine.training.order import Plan
from regraft.engine.training.run import StepInfo, _Run
from regraft.engine.training.setup import Prepared, set_threads

STANDARDISED_ON = 4096  # rows
CELLS = 65_536  # tokens of one micro-batch of token features
CELLS_OF_A_PART = 4096  # rows or tokens of which the figures are taken at a time


class FrozenRun(_Run):
    """One run of a head. transformers is not imported unless rows lack features."""

    def prepare(self) -> None:
        config = self.config
        self.speaks = not self.quiet and int(os.environ.get("RANK", "0")) == 0
        self.spec, tokenizer = feature_spec(config)
        task, parts = parts_of(config, self.spec, tokenizer)
        check_head(config.head.type, config.task.type, task.reads)
        sources = {name: part.source for name, part in parts.items()}
        if config.head.type == "zeroshot":
            check_descriptions(config.head.descriptions, task.labels)
            texts = [config.head.descriptions.get(label, label.replace("_", " ")) for label in task.labels]
            sources["labels"] = Rows("labels", "head.descriptions", texts, None, np.arange(len(texts)))
        found = features_of(config, sources, self.say, shown=self.speaks, made=(self.spec, tokenizer))
        self.descriptions = found.pop("labels", None)
        splits = {name: part.learned(found[name]) for name, part in parts.items()}
        notes = {name: part.note | {"tokens": int(found[name].lengths.sum())} for name, part in parts.items()}
        self.data = Prepared(task, tokenizer, self.spec.max_length, splits, notes)
        self.threads = set_threads(config)
        if config.training.threads is None and self.spec.pooling != "none":
            torch.set_num_threads(1)  # 32 rows of a few hundred numbers: sharing them out costs more than it brings
        self.precision = "fp32"
        import_solver(config.head)

    def build(self) -> None:
        training, train = self.config.training, self.data.splits["train"]
        features: FeatureRows = train.store  # type: ignore[assignment]
        self.accelerator = accelerator_for(self.config)
        torch.manual_seed(training.seed)
        task = self.data.task
        tokens = task.reads == TOKENS
        head = build_head(self.config.head, len(self.spec.layers), self.spec.hidden, task.outputs, tokens=tokens)
        self.fitted = self.config.head.type in SOLVED
        head.start_at(task.scale)
        task.attach(head)
        self.fit_scale(head, features)
        self.head = head
        if self.config.model.kernels == "auto" and self.accelerator.device.type == "cpu":
            bind_dropout(head)
        self.running = FeatureHead(head).to(self.accelerator.device)  # type: ignore[assignment]
        limit = 1 if self.fitted else training.max_steps
        self.plan = Plan(len(train), training.batch_size, training.seed, training.epochs, limit)
        if features.bytes > RANDOM_BELOW and train.groups is None:
            self.plan = block_plan(self.plan, features)
        self.optimizer = head_optimizer(head, training)
        self.parameters = list(head.parameters())
        self.averaged = AveragedWeights(self.parameters, training.ema) if training.ema and not self.fitted else None
        self.stepper = HeadStepper(
            accelerator=self.accelerator,
            model=self.accelerator.prepare_model(self.running),
            optimizer=self.optimizer,
            parameters=self.parameters,
            task=task,
            examples=train,
            seed=training.seed,
            token_budget=1 << 40 if features.pooled else CELLS,
            max_grad_norm=training.max_grad_norm,
            mix=head.mix,
        )
        count = sum(p.numel() for p in self.parameters)
        how = "solved at once" if self.fitted else f"{self.plan.total_steps:,} steps of {training.batch_size}"
        self.say(f"{self.config.head.type} head on {self.config.model.name}: {count:,} parameters, {how}")

    def fit_scale(self, head: Head, features: FeatureRows) -> None:
        """Set the head's standardisation from some training rows; directions are compared as they are."""
        if head.kind in ON_THE_SPHERE:
            return
        draw = np.random.Generator(np.random.Philox(key=[self.config.training.seed, 1 << 40]))
        some = np.arange(len(features))
        if len(some) > STANDARDISED_ON:
            some = np.sort(draw.choice(len(some), STANDARDISED_ON, replace=False))
        if not features.pooled:
            some = some[: max(1, int(STANDARDISED_ON * 16 / max(1.0, float(features.lengths.mean()))))]
        size = len(some) if features.pooled else int(features.lengths[some].sum())
        parts = np.array_split(some, -(-size // CELLS_OF_A_PART))
        head.standardise.fit(features.batch(part).features for part in parts)

    def take_step(self) -> None:
        if self.fitted:
            self.solve()
        else:
            super().take_step()

    def new_order(self, epoch: int) -> np.ndarray:
        order = super().new_order(epoch)
        if self.accelerator.num_processes == 1:  # a share of a step does not come in this order
            self.data.splits["train"].store.expect(order)  # type: ignore[attr-defined]
        return order

    def solve(self) -> None:
        """The one step of a head that is solved: over all rows at once."""
        began = time.perf_counter()
        train, task = self.data.splits["train"], self.data.task
        rows = 0
        if self.descriptions is not None:
            describe(self.head, self.descriptions.whole())
        else:
            rows = len(train.rows)
            features = train.store.whole()  # type: ignore[attr-defined]
            fit(self.head, features, np.asarray(train.targets), train.weights, task, self.config.head)
        self.state.step += 1
        self.state.tokens += int(train.store.lengths.sum()) if rows else 0
        seconds = time.perf_counter() - began
        self.state.seconds = self.seconds_before + seconds
        info = StepInfo(0, self.state.tokens, seconds, float("nan") if not rows else 0.0)
        self.log_step(info, 0.0)
        if self.on_step:
            self.on_step(info)

    def log_step(self, info: StepInfo, norm: float) -> None:
        if not self.fitted:
            super().log_step(info, norm)
        elif self.history:
            self.history.add({"kind": "fitted", "head": self.config.head.type, "seconds": round(info.seconds, 3)})

    def save_best(self) -> None:
        if self.accelerator.is_main_process:
            save_head(self.folder / "best-head.safetensors", self.head)

    def load_best(self) -> None:
        from safetensors.torch import load_file

        file = self.folder / "best-head.safetensors"
        self.head.load_state_dict(load_file(file))
        if self.accelerator.is_main_process:
            save_grafted(self.folder / "best", model_folder(self.config), file, self.facts())
        self.accelerator.wait_for_everyone()

    def facts(self) -> dict[str, Any]:
        """What regraft.json says of this model."""
        spec = self.spec
        return {
            "task": self.data.task.spec(),
            "max_length": spec.max_length,
            "data": self.config.data.model_dump(mode="json"),
            "base_model": self.config.model.name,
            "method": self.config.method,
            "seed": self.config.training.seed,
            "head": self.head.shape.spec(),
            "features": {"layers": list(spec.layers), "pooling": spec.pooling, "normalise": spec.normalise},
        }

    def findings(self) -> dict[str, Any]:
        return self.head.findings(self.spec.layers)


def head_optimizer(head: torch.nn.Module, training: TrainingConfig) -> Any:
    """The configured optimizer; plain AdamW without torch.optim."""
    if training.optimizer != "adamw":
        return build_optimizer(head, training)
    return FusedAdamW(parameter_groups(head, training), betas=training.betas, eps=training.epsilon)


def accelerator_for(config: Any, precision: str = "fp32") -> Any:
    """accelerate's Accelerator where there are processes, trackers or mixed precision to serve, else what stands in for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not config.trackers and precision == "fp32":
        return LocalProcess()
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    folder = config.run
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=os.path.join(folder, "trackers")),  # noqa: PTH118
        step_scheduler_with_optimizer=False,
    )
