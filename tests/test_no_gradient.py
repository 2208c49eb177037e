"""Models whose forward runs under no_grad or inference_mode, of which nothing can be learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import ModelError, TrainingError


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def pair(request):
    class Deployed(nn.Sequential):
        @request.param()
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    dense = Deployed(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    return dense, rankopt.apply(dense, rankopt.search(dense, "params<=60%"))


DATA = [torch.randn(32, 16) for _ in range(2)]


def test_recover_and_relaxed_say_so(pair):
    dense, small = pair
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(ModelError, match="recover needs the gradient of the model's output"):
        rankopt.recover(small, teacher=dense, calibration=DATA, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    with pytest.raises(ModelError, match="relaxed needs the gradient of the loss"):
        rankopt.search(dense, "params<=60%", strategy="relaxed", calibration=DATA)


def test_finetune_with_a_teacher_does_not_pretend_to_learn_from_labels(pair):
    dense, small = pair
    data = [(x, torch.zeros(32, dtype=torch.long)) for x in DATA]
    with pytest.raises(TrainingError, match="without one nothing trains"):
        rankopt.finetune(small, data, teacher=dense, epochs=1)
