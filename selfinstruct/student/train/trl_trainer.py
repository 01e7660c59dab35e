"""TRL's SFTTrainer on our rows: our ids, labels, order and numbers; its loop, loss, optimizer and checkpoints.

TRL is given finished ids and labels, so it tokenises nothing: its own way joins prompt and completion to one text, and
drops the prompt's last character from the training row where a token spans both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from selfinstruct.student.train import adapters
from selfinstruct.student.train.assembly import lasting
from selfinstruct.student.train.batches import epoch_order
from selfinstruct.student.train.prepare import Prepared
from selfinstruct.student.train.tokens import Tokens
from selfinstruct.student.train.trainee import load_model

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_IGNORED = -100  # what a label that does not count is called there


class Order(Sampler[int]):
    """The rows of epoch ``epoch`` by the order rule of ``batches``, whose steps are then those of the native backend.

    The epoch is set from the step that training stands at: what the libraries tell a sampler gets lost where a
    resumed epoch skips its first rows.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self._rows, self._seed, self.epoch).tolist())


class OrderedTrainer(SFTTrainer):
    """SFTTrainer that takes the rows of ``order`` and writes no model card."""

    order: Order

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint, alone. (The library's own adds a pickle of its arguments; for peft see
        ``result``.)"""
        model: Any = self.model
        options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(output_dir, **options)

    def create_model_card(self, *_arguments: Any, **_options: Any) -> None:
        """Nothing: run.json says what the run is, and the card would name TRL's authors as this model's."""


def model_for(prepared: Prepared) -> tuple[Any, Any]:
    """(model, peft's handle or None). What is trained is in fp32: a bf16 weight swallows small updates."""
    recipe = prepared.recipe
    torch.manual_seed(recipe.seed)
    model = load_model(
        prepared.model, dtype=torch.float32 if recipe.method == "full" else prepared.dtype, kernel=None,
        device=prepared.device, four_bit=recipe.method == "qlora",
    )  # fmt: skip
    if recipe.method == "full":
        return model, None
    handle = adapters.add(model, recipe, lasting(prepared.model))
    for parameter in handle.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, handle


def trainer_for(prepared: Prepared, model: Any, run: Path, callback: TrainerCallback) -> tuple[OrderedTrainer, Order]:
    """A trainer that is ready to train ``model`` (with its adapters, if any) on the prepared rows."""
    without_telemetry()
    recipe = prepared.recipe
    order = Order(len(prepared.train), recipe.seed)
    filler = prepared.tokenizer.pad_token_id
    if filler is None or filler >= model.get_input_embeddings().weight.shape[0]:
        filler = prepared.template.eos_id(prepared.tokenizer)
    trainer = OrderedTrainer(
        model=model,
        args=settings(prepared, run),
        data_collator=Padded(filler),
        train_dataset=as_dataset(prepared.train),
        processing_class=prepared.tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the outcome
    trainer.order = order
    return trainer, order


def settings(prepared: Prepared, run: Path) -> SFTConfig:
    """The recipe in TRL's words."""
    recipe, cuda = prepared.recipe, prepared.device.type == "cuda"
    rows = micro_rows(recipe.batch, prepared.plan.tokens, int(prepared.train.lengths.max()))
    # Renamed in transformers 5.2x; the old name warns there.
    modern = "activation_checkpointing" in SFTConfig.__dataclass_fields__
    recomputing: dict[str, Any] = {
        "activation_checkpointing" if modern else "gradient_checkpointing": prepared.plan.checkpointed_layers > 0
    }
    return SFTConfig(
        output_dir=str(run),
        max_steps=prepared.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=recipe.batch // rows,
        learning_rate=recipe.lr,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps(prepared.steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_norm,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        seed=recipe.seed,
        bf16=prepared.dtype == torch.bfloat16,
        use_cpu=not cuda,
        max_length=None,  # the rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a diverged run must show it
        save_strategy="no",  # when to save, the callback says
        save_total_limit=1,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **recomputing,
    )


def micro_rows(batch: int, budget: int, longest: int) -> int:
    """Rows of a padded micro-batch: as many as a budget of tokens holds, and a divisor of the step's rows."""
    most = max(1, min(batch, budget // longest))
    return next(rows for rows in range(most, 0, -1) if batch % rows == 0)


def as_dataset(tokens: Tokens) -> Dataset:
    """Rows as the columns that TRL trains on as they are."""
    ids, labels = [], []
    for number in range(len(tokens)):
        row, first = tokens.row(number), int(tokens.loss_from[number])
        ids.append(row)
        counted = row.copy()
        counted[:first] = _IGNORED
        labels.append(counted)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


class Padded:
    """Rows as one batch, filled up on the right. TRL's own collator gives a tokenizer without padding one, for good."""

    def __init__(self, filler: int) -> None:
        self._filler = filler

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        ids, mask, labels = (torch.full(shape, fill) for fill in (self._filler, 0, _IGNORED))
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[i, :size], labels[i, :size] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[i, :size] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def validation_loss(trainer: OrderedTrainer, tokens: Tokens) -> float:
    """Mean cross-entropy over the labels of other rows. (TRL's own is a mean of batches, whatever their labels.)"""
    model, rows = trainer.model_wrapped, as_dataset(tokens)
    size = trainer.args.per_device_train_batch_size
    total = 0.0
    balance, trainer.aux_loss_enabled = getattr(trainer, "aux_loss_enabled", False), False  # of experts: not asked here
    model.eval()
    for start in range(0, len(rows), size):
        batch = trainer.data_collator([rows[i] for i in range(start, min(len(rows), start + size))])
        batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
        with trainer.compute_loss_context_manager():
            total += float(trainer.compute_loss(model, batch, num_items_in_batch=1))
    model.train()
    trainer.aux_loss_enabled = balance
    return total / max(1, int(tokens.labels.sum()))


def without_telemetry() -> None:
    """TRL tells its authors of every trainer that is made, unless the library that sends it is set not to.

    The variable for it (HF_HUB_DISABLE_TELEMETRY) is read at that library's import, which has been by now.
    """
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
