from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rankopt
from rankopt.errors import MissingDependency, TrainingError
from rankopt.training import SequentialFreezing
from rankopt.training.callbacks import hugging_face_callback, lightning_callback


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 8)
        self.frozen = []

    def forward(self, x, labels=None):
        if self.training:
            self.frozen.append(tuple(n for n, p in self.named_parameters() if not p.requires_grad))
        logits = self.head(self.body(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def small():
    dense = Net()
    return rankopt.apply(dense, rankopt.search(dense, "params<=60%", only=["body"]))


EVEN, ODD = ("body.first.weight",), ("body.last.weight",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "expected"), [(None, [EVEN, EVEN, ODD, ODD]), (1, [EVEN, ODD, EVEN, ODD])]
)
def test_hugging_face(small, tmp_path, steps, expected):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"x": torch.randn(32), "labels": 1} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    callback = hugging_face_callback(SequentialFreezing(small), steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(small, arguments, train_dataset=data, callbacks=[callback]).train()
    assert small.frozen == expected
    assert all(p.requires_grad for p in small.parameters())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        yield from ({"x": torch.randn(32, generator=generator), "labels": 1} for _ in range(8))


@pytest.mark.slow
def test_hugging_face_with_a_stream_after_an_interruption(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    freezer = SequentialFreezing(small)
    freezer.step(0)  # as an interrupted run leaves it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(
            small, arguments, train_dataset=Stream(), callbacks=[hugging_face_callback(freezer)]
        )
        trainer.train()
    assert small.frozen == [EVEN, EVEN, ODD, ODD, EVEN, EVEN]
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in small.parameters()} <= known


@pytest.mark.slow
def test_lightning(small, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = small

            def training_step(self, batch, index):
                return self.model(*batch)["loss"]

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[lightning_callback(SequentialFreezing(small))],
        )  # fmt: skip
        data = TensorDataset(torch.randn(8, 32), torch.zeros(8, dtype=torch.long))
        trainer.fit(Module(), DataLoader(data, batch_size=4))
    assert small.frozen == [EVEN, EVEN, ODD, ODD]
    assert all(p.requires_grad for p in small.parameters())


def test_what_they_refuse(small, monkeypatch):
    freezer = SequentialFreezing(small)
    callback = hugging_face_callback(freezer)
    with pytest.raises(TrainingError, match="cannot run in 2 processes"):
        callback.on_train_begin(types.SimpleNamespace(world_size=2), None, None)
    with pytest.raises(ValueError, match="steps=0"):
        hugging_face_callback(freezer, steps=0)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingDependency, match="pip install lightning"):
        lightning_callback(freezer)
