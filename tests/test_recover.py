from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rankopt
from rankopt._model.inputs import LEAST_SAMPLES, divergence
from rankopt.errors import CalibrationError, ModelError, RankoptWarning
from rankopt.testing import planted_model
from rankopt.training import limit, repair
from rankopt.training.augmentation import shift_and_mirror
from rankopt.training.repair import MOST_RISE, clearly_worse


@pytest.fixture
def pair():
    teacher = planted_model(noise=0.5)
    held = [torch.randn(32, 3, 12, 12) for _ in range(4)]
    plan = rankopt.search(teacher, "params<=25%", strategy="parameter_ratio")
    return teacher, rankopt.apply(teacher, plan), held


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_comes_closer_to_its_teacher(pair):
    teacher, small, held = pair
    theirs = snapshot(teacher)
    modes = [module.training for module in small.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    done = rankopt.recover(small, teacher=teacher, calibration=held, steps=20)
    assert torch.equal(state, torch.get_rng_state())
    assert done.kept
    assert done.after < done.before
    assert done.steps == 20
    assert "20 steps, until all steps were taken" in str(done)
    assert "held-out inputs" in str(done)
    assert all(torch.equal(theirs[k], v) for k, v in teacher.state_dict().items())
    assert [module.training for module in small.modules()] == modes
    assert all(parameter.grad is None for parameter in small.parameters())


def test_autocast_is_ones_own_or_none(pair):
    """Under a caller's autocast the weights it has cached would be those before training."""
    teacher, small, held = pair
    with torch.autocast("cpu", torch.bfloat16):
        done = rankopt.recover(small, teacher=teacher, calibration=held, steps=20, precision="bf16")
    assert done.kept
    x = torch.cat(held)
    with torch.no_grad():
        after = divergence(teacher(x), small(x))
    assert after < done.before
    assert all(value.dtype != torch.bfloat16 for value in small.state_dict().values())
    with pytest.raises(ValueError, match="precision='fp16'"):
        rankopt.recover(small, teacher=teacher, calibration=held, precision="fp16")


def test_leaves_the_model_alone_where_it_does_not_help(pair):
    teacher, small, held = pair
    before = snapshot(small)
    done = rankopt.recover(small, teacher=teacher, calibration=held, steps=3, learning_rate=10.0)
    assert not done.kept
    assert done.after == done.before
    assert "it came out worse, so the model is as it was" in str(done)
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items())


def test_what_cannot_be_told_apart_is_kept():
    draw = torch.Generator().manual_seed(0)
    before = torch.rand(64, generator=draw, dtype=torch.float64)
    noise = 0.1 * torch.randn(64, generator=draw, dtype=torch.float64)
    noise -= noise.mean()
    error = float(noise.std()) / 8
    for rise, worse in ((-error, False), (0.9 * error, False), (1.1 * error, True)):
        assert clearly_worse(before, before + noise + rise) is worse
    # A single sample has no standard error.
    one = torch.ones(1, dtype=torch.float64)
    assert clearly_worse(one, one + 1e-6)
    assert not clearly_worse(one, one - 1e-6)


def test_harm_to_a_single_sample_is_no_chance():
    before = torch.ones(64, dtype=torch.float64)
    after = before - 1e-3
    after[5] = 100.0
    assert clearly_worse(before, after)


def test_what_is_not_finite_is_worse():
    fine = torch.ones(2, dtype=torch.float64)
    broken = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    assert clearly_worse(fine, broken)
    assert clearly_worse(broken, broken)
    assert not clearly_worse(broken, fine)


def test_a_change_too_small_to_tell_is_said(pair, monkeypatch):
    teacher, small, held = pair
    before = snapshot(small)
    spread = torch.tensor([0.0, 2.0, 0.0, 2.0], dtype=torch.float64)
    found = [spread.flip(0), spread + 0.01, spread + 0.01]
    monkeypatch.setattr(repair._Repair, "distances", lambda self: found.pop(0))
    done = rankopt.recover(small, teacher=teacher, calibration=held, steps=3)
    assert (done.kept, done.before, done.after) == (True, 1.0, pytest.approx(1.01))
    assert "1 before, 1.01 after, too little apart to tell; the repaired" in str(done)
    assert any(not torch.equal(before[k], v) for k, v in small.state_dict().items())


def test_frozen_parameters_stay(pair):
    teacher, small, held = pair
    for parameter in small.head.parameters():
        parameter.requires_grad_(False)
    before = snapshot(small.head)
    rankopt.recover(small, teacher=teacher, calibration=held, steps=3)
    assert all(torch.equal(before[k], v) for k, v in small.head.state_dict().items())
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to train"):
        rankopt.recover(small, teacher=teacher, calibration=held)


def test_mappings_and_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.5, batch_first=True)

        def forward(self, *, x):
            return {"hidden": self.layer(x)}

    teacher = Net().eval()
    held = [{"x": torch.randn(64, length, 32)} for length in (5, 7, 7, 4)]
    plan = rankopt.search(teacher, "params<=40%", calibration=held)
    small = rankopt.apply(teacher, plan, calibration=held)
    done = rankopt.recover(small, teacher=teacher, calibration=held, steps=30)
    assert done.kept
    assert done.after < done.before


def test_bad_requests(pair):
    teacher, small, held = pair
    for settings, match in (
        ({"seconds": 0}, "seconds=0: expected a positive number"),
        ({"steps": 0}, "steps=0: expected an integer of at least 1"),
        ({"steps": 2.0}, "steps=2.0: expected an integer"),
        ({"learning_rate": "fast"}, "learning_rate='fast': expected a positive number"),
        ({"seed": "a"}, "seed='a': expected an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=match):
            rankopt.recover(small, teacher=teacher, calibration=held, **settings)
    with pytest.raises(CalibrationError, match="at least 16 calibration samples, got 4"):
        rankopt.recover(small, teacher=teacher, calibration=[held[0][:4]])
    with pytest.raises(ValueError, match="augment='flip'"):
        rankopt.recover(small, teacher=teacher, calibration=held, augment="flip")
    wrong = [torch.randn(16, 3, 12, 12), torch.randn(16, 4, 12, 12)]
    with pytest.raises(CalibrationError, match="fails on a calibration batch"):
        rankopt.recover(small, teacher=teacher, calibration=wrong)
    other = copy.deepcopy(teacher)
    other.head = nn.Linear(64, 7)
    with pytest.raises(CalibrationError, match=r"outputs changed from \[8, 7\] to \[8, 10\]"):
        rankopt.recover(small, teacher=other, calibration=held, steps=1)


def test_augmentation_touches_images_only():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16)
    assert shift_and_mirror(images, generator).shape == images.shape
    assert not torch.equal(shift_and_mirror(images, generator), images)
    tokens = torch.randint(0, 5, (2, 7))
    assert shift_and_mirror(tokens, generator) is tokens


def test_batches_of_one_sample():
    """A last batch of one gives BatchNorm1d a single value, of which it takes no variance."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = list(torch.randn(65, 16).split(16))
    assert len(data[-1]) == 1
    plan = rankopt.search(dense, "params<=70%", calibration=data)
    small = rankopt.apply(dense, plan, calibration=data)
    done = rankopt.recover(small, teacher=dense, calibration=data, steps=5)
    assert done.after <= (1 + MOST_RISE) * done.before


def test_a_failure_after_the_training_leaves_the_model_as_it_was(pair, monkeypatch):
    dense, small, held = pair
    before = {name: value.clone() for name, value in small.state_dict().items()}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(repair, "settle_norms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rankopt.recover(small, teacher=dense, calibration=held, steps=2)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_half_precision_is_refused(pair):
    dense, small, held = pair
    data = [x.half() for x in held]
    with pytest.raises(ModelError, match=r"float16 parameters.*\.float\(\) or \.bfloat16\(\)"):
        rankopt.recover(small.half(), teacher=dense.half(), calibration=data, seconds=1)


def test_outputs_of_held_out_samples_are_kept_while_they_take_little_memory(pair, monkeypatch):
    teacher, small, held = pair
    kept = []
    monkeypatch.setattr("rankopt._model.inputs.OUTPUT_BYTES", 1)
    monkeypatch.setattr(repair, "main_output", lambda x: kept.append(len(x)) or x)
    rankopt.recover(small, teacher=teacher, calibration=held, steps=1)
    assert sum(kept) == LEAST_SAMPLES


class Versioned(nn.Sequential):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_batches_of_one_and_inference_mode():
    """Of 34 samples 31 are trained on: the last batch of two has one."""
    dense = Versioned(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32)).eval()
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    for count in (34, 35):
        with torch.inference_mode():
            done = rankopt.recover(
                small,
                teacher=dense,
                calibration=[torch.randn(count, 32)],
                steps=20,
                batch_size=2,
            )
        assert done.steps == 20
    with pytest.raises(ValueError, match="batch_size=0: expected an integer of at least 1"):
        rankopt.recover(small, teacher=dense, calibration=[], batch_size=0)


def test_steps_alone_give_the_same_weights(pair, monkeypatch):
    teacher, small, held = pair
    again = copy.deepcopy(small)
    done = rankopt.recover(small, teacher=teacher, calibration=held, steps=7, seed=3)
    assert (done.steps, done.stopped, done.kept) == (7, "steps", True)
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=lambda: next(hours)))
    rankopt.recover(again, teacher=teacher, calibration=held, steps=7, seed=3)
    assert all(map(torch.equal, small.state_dict().values(), again.state_dict().values()))


class Slow(nn.Sequential):
    """Takes a millisecond of a clock of its own for every sample."""

    now = 0.0

    def forward(self, x):
        Slow.now += len(x) / 1000
        return super().forward(x)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(Slow, "now", 0.0)
    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=lambda: Slow.now))
    torch.manual_seed(0)
    dense = Slow(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)).eval()
    return dense, rankopt.apply(dense, rankopt.search(dense, "params<=70%"))


def test_seconds_bound_what_comes_after_training_too(slow):
    """BatchNorm statistics of all samples would take twice the time by themselves."""
    dense, small = slow
    data = list(torch.randn(2048, 16).split(128))
    done = rankopt.recover(small, teacher=dense, calibration=data, seconds=4)
    assert done.seconds <= 4
    assert done.steps > 5
    assert "until the time was up" in str(done)


def test_no_time_for_a_step(slow):
    dense, small = slow
    before = snapshot(small)
    match = r"took no step: .* with 512 inputs none fits into 0.1 s"
    with pytest.warns(RankoptWarning, match=match) as said:
        done = rankopt.recover(
            small, teacher=dense, calibration=[torch.randn(512, 16)], seconds=0.1
        )
    assert said[0].filename == __file__
    assert (done.steps, done.kept, done.stopped) == (0, False, "seconds")
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items())


def test_the_first_limit_to_be_reached_ends_it(slow):
    dense, small = slow
    data = [torch.randn(128, 16)]
    few = rankopt.recover(small, teacher=dense, calibration=data, seconds=1000, steps=3)
    assert (few.steps, few.stopped) == (3, "steps")
    many = rankopt.recover(small, teacher=dense, calibration=data, seconds=3, steps=1000)
    assert 0 < many.steps < 1000
    assert many.stopped == "seconds"


@pytest.mark.parametrize("sample", [0, 40])
def test_a_sample_of_nan_is_named(pair, sample):
    """Whether it is among those held out or not."""
    teacher, small, held = pair
    before = snapshot(small)
    held = [*held[:3], held[3].clone()]
    held[sample // 32][sample % 32] = torch.nan
    with pytest.raises(CalibrationError, match="outputs that are not finite on these inputs"):
        rankopt.recover(small, teacher=teacher, calibration=held, steps=10)
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items())


def test_a_loss_that_is_not_finite_ends_it(pair):
    teacher, small, held = pair
    before = snapshot(small)
    done = rankopt.recover(small, teacher=teacher, calibration=held, steps=10, learning_rate=1e30)
    assert (done.stopped, done.kept) == ("not finite", False)
    assert "the loss was not finite: lower learning_rate" in str(done)
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items())


def test_nothing_to_repair(pair):
    teacher, _, held = pair
    done = rankopt.recover(copy.deepcopy(teacher), teacher=teacher, calibration=held)
    assert (done.steps, done.stopped, done.before) == (0, "converged", 0)
