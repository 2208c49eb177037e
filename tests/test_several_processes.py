"""Fine-tuning in two processes, beside the same in one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from finetuning import equal, in_batches
from torch import nn

import rankopt
from rankopt.training import Sequential

pytest.importorskip("accelerate")


DISTRIBUTED = """
import atexit, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_several_processes import note_threads, together
atexit.register(note_threads, {folder!r})  # what is registered later is called before
together({folder!r})
"""


class Idle(nn.Module):
    """A layer that the outputs do without, as language models' poolers."""

    def __init__(self):
        super().__init__()
        self.used, self.pooler = nn.Linear(24, 4), nn.Linear(24, 4)

    def forward(self, x):
        return self.used(x)


class Boxed(nn.Module):
    """Outputs that DistributedDataParallel cannot look into."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(24, 4)

    def forward(self, x):
        return types.SimpleNamespace(logits=self.used(x))


def together(folder, accumulate=1):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 4))
    plan = rankopt.search(teacher, "params<=60%")
    small = rankopt.apply(teacher, plan)
    train = in_batches(torch.randn(128, 24), torch.randint(0, 4, (128,)), 16)
    schedule = Sequential().front("1", 2)  # half of the steps
    done = rankopt.finetune(
        small, train, teacher=teacher, freezing=schedule, freezing_steps=2, epochs=2,
        accumulate=accumulate, evaluate=lambda model: 1.0, folder=folder,
    )  # fmt: skip
    rank = os.environ.get("RANK", "alone")
    normed = nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    averaged = copy.deepcopy(normed)
    rankopt.finetune(normed, train, epochs=1)
    rankopt.finetune(averaged, train, epochs=1, ema=0.9)
    torch.manual_seed(7 + int(os.environ.get("RANK", 0)))  # the first process's weights count
    idle = Idle()
    rankopt.finetune(idle, train, epochs=1)
    begun = Idle()
    rankopt.finetune(begun, train, epochs=1, optimizer="sgd", accumulate=accumulate)
    rankopt.finetune(
        Boxed(), train, epochs=1, loss=lambda out, y: nn.functional.cross_entropy(out.logits, y)
    )
    states = {
        "seen": _seen_in_an_epoch(normed),
        "seen of its own": _seen_in_an_epoch(normed, Hundreds),
        "state": small.state_dict(),
        "normed": normed.state_dict(),
        "averaged": averaged.state_dict(),
        "idle": idle.state_dict(),
        "begun": begun.state_dict(),
    }
    losses = [epoch["loss"] for epoch in done.history]
    torch.save({**states, "loss": losses}, f"{folder}/result-{rank}.pt")


def note_threads(folder):
    """Those of the process group would end the interpreter by an abort, now and then."""
    tasks = Path("/proc/self/task").glob("*/comm")  # none but on Linux
    names = [name for task in tasks if "gloo" in (name := task.read_text())]
    Path(folder, f"threads-{os.environ['RANK']}").write_text("".join(names))


class Hundreds(torch.utils.data.DataLoader):
    """Yields samples that its data set does not hold."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x + 100, y


def _seen_in_an_epoch(model, kind=torch.utils.data.DataLoader):
    """Which of 64 samples a process trains on; their sampler knows of no other process."""
    x = torch.arange(64.0)[:, None].expand(64, 24)
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 64, 64, replacement=False)
    loader = kind(
        torch.utils.data.TensorDataset(x, torch.zeros(64, dtype=torch.long)), 8, sampler=sampler
    )
    seen = []

    def noted(inputs, generator):
        seen.extend(inputs[:, 0].tolist())
        return inputs

    rankopt.finetune(model, loader, epochs=1, augment=noted)
    return seen


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    code = tmp_path / "both.py"
    code.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ran = subprocess.run([*command, code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    together(str(alone), accumulate=2)
    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in (0, 1))
    one = torch.load(alone / "result-alone.pt")
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)] == ["", ""]
    assert equal(first["state"], second["state"])
    for kind in ("normed", "averaged"):  # statistics of norms as well
        assert equal(first[kind], second[kind])
    assert equal(first["idle"], second["idle"])
    for kind in ("state", "begun"):
        for key, value in one[kind].items():
            assert torch.allclose(first[kind][key], value, atol=1e-5), key
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for kind, begin in (("seen", 0), ("seen of its own", 100)):
        assert len(first[kind]) == len(second[kind]) == 32
        both = sorted(first[kind] + second[kind])
        assert both == sorted(one[kind]) == list(range(begin, begin + 64))
