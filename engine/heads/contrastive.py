"""`method: contrastive`: pull the few rows of a class together, push the others away, then solve a head on what comes out.

In the manner of SetFit (Tunstall et al. 2022), with two differences: a step encodes each of its rows once and compares
all of them with one another, instead of encoding two texts for every pair; and each row is told apart from all others
of its step at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.engine.batches import by_length, collate
from regraft.engine.data.tokens import TokenStore
from regraft.engine.features.encoder import GraftedEncoder, load_backbone
from regraft.engine.features.spec import model_folder
from regraft.engine.files import new_folder
from regraft.engine.half_weights import bind_half_weights
from regraft.engine.heads.fitted import fit
from regraft.engine.heads.head import ON_THE_SPHERE, build_head
from regraft.engine.heads.model import HEAD_FILE, load_head, save_head
from regraft.engine.heads.run import accelerator_for
from regraft.engine.models import ready_to_answer
from regraft.engine.training.optimizer import AveragedWeights, build_optimizer
from regraft.engine.training.order import Plan, share_by_tokens
from regraft.engine.training.run import _Run
from regraft.engine.training.setup import choose_precision, prepare, set_threads
from regraft.engine.training.step import Stepper, seed_dropout, step_seed, without_ddp

TOGETHER = 2  # rows of one class that come into the same step: the fewer, the more classes there are to tell apart
TEMPERATURE = 0.1  # of the cosines, as in Khosla et al.
ENCODED = 4096  # tokens of one forward pass without gradient


@dataclass(frozen=True)
class PairPlan(Plan):
    """A Plan whose steps hold groups of TOGETHER rows of one class, so that each step has pairs to pull together."""

    targets: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def order(self, epoch: int) -> np.ndarray:
        draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        groups = []
        for label in np.unique(self.targets):
            mine = draw.permutation(np.flatnonzero(self.targets == label))
            groups += [mine[at : at + TOGETHER] for at in range(0, len(mine), TOGETHER)]
        return np.concatenate([groups[g] for g in draw.permutation(len(groups))])


def pair_loss(rows: Tensor, targets: Tensor) -> Tensor:
    """How far rows are from lying beside their own class alone: the sum of `cosine_loss` and `contrast_loss`.

    The first says where pairs of one class and of two shall lie; the second looks at the nearest rows of other classes,
    which among many classes are lost in the first one's mean. Shape: rows [B, H], targets [B] -> scalar.
    """
    if len(rows) < 2:
        return rows.sum() * 0.0
    unit = torch.nn.functional.normalize(rows.float(), dim=-1)
    cosines, same = unit @ unit.T, targets[:, None] == targets[None]
    return cosine_loss(cosines, same) + contrast_loss(cosines, same)


def cosine_loss(cosines: Tensor, same: Tensor) -> Tensor:
    """Mean of (1 - cos)^2 over pairs of one class and of cos^2 over pairs of two, each kind counting half (Tunstall et al. 2022).

    Shape: cosines, same [B, B] -> scalar. Without pairs of a kind it is the other's mean alone.
    """
    above = torch.triu(torch.ones_like(same), diagonal=1)
    near, far = cosines[above & same], cosines[above & ~same]
    return torch.stack([part.mean() for part in ((1 - near).square(), far.square()) if len(part)]).mean()


def contrast_loss(cosines: Tensor, same: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2): of the softmax over a row's cosines with all others, minus the mean
    log of what falls to its own class; the mean over rows that have company.

    Shape: cosines, same [B, B] -> scalar; 0 where no class has two rows.
    """
    oneself = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    own = same & ~oneself
    shares = (cosines / TEMPERATURE).masked_fill(oneself, -torch.inf).log_softmax(-1)
    company = own.sum(-1)
    means = shares.masked_fill(~own, 0.0).sum(-1) / company.clamp(min=1)
    return -means.sum() / (company > 0).sum().clamp(min=1)


@dataclass
class PairStepper(Stepper):
    """One step over all pairs of its rows. With several processes, over the pairs within each one's share."""

    def _gradients(self, step: int, rows: np.ndarray) -> Tensor:
        accelerator = self.accelerator
        mine = rows[
            share_by_tokens(self.examples.store.lengths[rows], accelerator.num_processes)[accelerator.process_index]
        ]
        mine = mine if len(mine) else rows[:1]
        seed_dropout(step_seed(self.seed, step, accelerator.process_index, 0), accelerator.device)
        with accelerator.autocast():
            found = without_ddp(self.model)(collate(self.examples.store, mine).to(accelerator.device))
        loss = pair_loss(found, torch.from_numpy(np.asarray(self.examples.targets)[mine]).to(accelerator.device))
        accelerator.backward(loss)
        return loss.detach().double()


class ContrastiveRun(_Run):
    """Train the encoder on pairs; at the end, solve the head and measure."""

    def prepare(self) -> None:
        import os

        self.speaks = not self.quiet and int(os.environ.get("RANK", "0")) == 0
        self.threads, self.precision = set_threads(self.config), choose_precision(self.config)
        self.data = prepare(self.config, self.say)

    def build(self) -> None:
        config, training, train = self.config, self.config.training, self.data.splits["train"]
        self.accelerator = accelerator_for(config, self.precision)
        torch.manual_seed(training.seed)
        backbone = load_backbone(model_folder(config)).requires_grad_(True)
        for name, weight in backbone.named_parameters():
            weight.requires_grad_("pooler" not in name)
        depth = int(backbone.config.num_hidden_layers)
        head = build_head(config.head, 1, int(backbone.config.hidden_size), self.data.task.outputs)
        self.head = head.requires_grad_(False)
        self.model = GraftedEncoder(backbone, (depth,), "mean", head=head)
        self.running = ready_to_answer(
            self.model, self.data.tokenizer.pad_token_id, packing=config.model.packing, kernels=config.model.kernels
        )
        if config.model.kernels == "auto" and self.precision == "bf16" and self.accelerator.device.type == "cpu":
            bind_half_weights(self.running)
        limit = training.max_steps
        self.plan = PairPlan(
            len(train.rows),
            training.batch_size,
            training.seed,
            training.epochs,
            limit,
            targets=np.asarray(train.targets),
        )
        self.optimizer = build_optimizer(self.model, training)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.averaged = AveragedWeights(self.parameters, training.ema) if training.ema else None
        self.stepper = PairStepper(
            accelerator=self.accelerator,
            model=self.accelerator.prepare_model(self.running),
            optimizer=self.optimizer,
            parameters=self.parameters,
            task=self.data.task,
            examples=train,
            seed=training.seed,
            token_budget=1 << 40,
            max_grad_norm=training.max_grad_norm,
        )
        self.say(f"{config.model.name}: {self.plan.total_steps:,} steps over pairs of {training.batch_size} rows")
        self.set_training_mode()

    def set_training_mode(self) -> None:
        self.running.train()
        self.model.bare = True

    def evaluation_due(self) -> bool:
        return self.state.step == self.plan.total_steps

    def evaluate(self) -> None:
        self.solve()
        super().evaluate()

    def solve(self) -> None:
        """Fit the head on the training rows as the encoder now sees them."""
        train, task = self.data.splits["train"], self.data.task
        self.running.eval()
        self.model.bare = True
        rows = self.encoded(train.store)
        if self.head.kind not in ON_THE_SPHERE:
            self.head.standardise.fit([rows])
        self.head.cpu()
        fit(self.head, rows, np.asarray(train.targets), train.weights, task, self.config.head)
        self.head.to(self.accelerator.device)
        self.model.bare = False

    @torch.no_grad()
    def encoded(self, store: TokenStore) -> Tensor:
        """Pooled rows [N, 1, H] of every text, on the host."""
        found = torch.empty(len(store), 1, self.head.shape.hidden)
        for rows in by_length(store.lengths, ENCODED):
            batch = collate(store, rows).to(self.accelerator.device)
            with self.accelerator.autocast():
                found[torch.from_numpy(rows)] = self.running(batch).cpu()[:, None]
        return found

    def save_best(self) -> None:
        from regraft.engine.trained import hugging_face_tokenizer, write_facts

        if not self.accelerator.is_main_process:
            return
        with new_folder(self.folder / "best") as beside:
            self.model.backbone.save_pretrained(beside)
            hugging_face_tokenizer(self.config.model).save_pretrained(beside)
            save_head(beside / HEAD_FILE, self.head)
            write_facts(beside, self.facts())

    def facts(self) -> dict[str, Any]:
        return {
            "task": self.data.task.spec(),
            "max_length": self.data.max_length,
            "data": self.config.data.model_dump(mode="json"),
            "base_model": self.config.model.name,
            "method": self.config.method,
            "seed": self.config.training.seed,
            "head": self.head.shape.spec(),
            "features": {"layers": list(self.model.layers), "pooling": "mean", "normalise": False},
        }

    def load_best(self) -> None:
        self.head.load_state_dict(load_head(self.folder / "best" / HEAD_FILE, self.head.shape.spec()).state_dict())
        self.model.bare = False
