"""ProjectedAdamW inside the training loops people use."""

import importlib.util

import pytest
import torch
from torch import nn

from isogrid.optim import ProjectedAdamW, TrainerFactory, make_optimizer
from tests.models import llama, tokens


class Tokens(torch.utils.data.Dataset):
    def __init__(self, rows=32):
        self.ids = tokens(rows, 12, 0)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(folder, **options):
    from transformers import TrainingArguments

    given = {"save_strategy": "no", "max_steps": 6} | options
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=3,
        **given,
    )


def trained(folder, chosen, resume=None, **options):
    from transformers import Trainer

    torch.manual_seed(0)
    trainer = Trainer(
        model=llama(), args=arguments(folder, **options), train_dataset=Tokens(), optimizer_cls_and_kwargs=chosen
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses


def bare(optimizer):
    while not isinstance(optimizer, ProjectedAdamW):
        optimizer = optimizer.optimizer
    return optimizer


@pytest.mark.parametrize(
    "chosen",
    [
        (ProjectedAdamW, {"lr": 0.01, "rank": 4, "refresh": 2}),
        (TrainerFactory, {"lr": 0.01, "method": "galore", "rank": 4, "refresh": 2}),
    ],
)
def test_transformers_trainer_trains_and_resumes_with_equal_losses(tmp_path, chosen):
    trainer, losses = trained(tmp_path / "whole", chosen)
    assert len(bare(trainer.optimizer).projected) >= 14
    assert len(set(losses)) == 6
    trained(tmp_path / "cut", chosen, save_strategy="steps", save_steps=3)
    _, again = trained(tmp_path / "cut", chosen, resume=str(tmp_path / "cut" / "checkpoint-3"))
    assert again == losses


def test_accelerate_prepares_steps_and_resumes(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(stop, folder=None, load=False):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
        optimizer = make_optimizer(model, lr=0.01, rank=2, refresh=3)
        model, optimizer = accelerator.prepare(model, optimizer)
        start = 0
        if load:
            accelerator.load_state(str(folder))
            start = 4
        losses = []
        for step in range(start, stop):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x[:, :3]).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        if folder and not load:
            accelerator.save_state(str(folder))
        return losses

    whole = run(8)
    run(4, tmp_path / "state")
    assert run(8, tmp_path / "state", load=True) == whole[4:]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="package lightning is absent")
def test_lightning_steps_through_its_closure(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.losses = []

        def training_step(self, batch, _):
            loss = (self.layer(batch) - batch).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return ProjectedAdamW(self.parameters(), 0.05, rank=3)

    module = Module()
    data = torch.utils.data.DataLoader(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert module.losses[-1] < module.losses[0]
