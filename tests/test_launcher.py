"""Fine-tuning in a process where something else uses accelerate."""

from __future__ import annotations

import pytest
from finetuning import equal, in_batches, problem, snapshot
from torch.utils.data import DataLoader, TensorDataset

import rankopt

pytest.importorskip("accelerate")


@pytest.fixture
def accelerator():
    """Someone's Accelerator, in another precision and stopped in the middle of an accumulation."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    theirs = Accelerator(gradient_accumulation_steps=4, mixed_precision="bf16", cpu=True)
    theirs.gradient_state._set_sync_gradients(False)
    yield theirs
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _tuned():
    _, small, x, y = problem(64)
    rankopt.finetune(small, in_batches(x, y), epochs=1, optimizer="sgd", clip=None)
    return snapshot(small)


@pytest.fixture(scope="module")
def alone():
    return _tuned()


def test_another_accelerator_neither_decides_nor_is_changed(alone, accelerator):
    assert equal(_tuned(), alone)
    assert not accelerator.sync_gradients
    assert accelerator.gradient_accumulation_steps == 4
    assert accelerator.mixed_precision == "bf16"


def test_the_environment_does_not_divide_the_gradients(alone, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert equal(_tuned(), alone)


def test_the_sampler_of_a_loader_is_put_back():
    _, small, x, y = problem(64)
    train = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    sampler = train.batch_sampler.sampler
    rankopt.finetune(small, train, epochs=1)
    assert train.batch_sampler.sampler is sampler
