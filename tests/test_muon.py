from __future__ import annotations

import pytest
import torch
from finetuning import equal, in_batches, problem, snapshot
from torch import nn

import rankopt
from rankopt.training import Sequential
from rankopt.training.muon import Muon, matrices, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 6)])
def test_singular_vectors_stay_and_values_are_alike(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalised(matrix) @ v.T
    values = found.diagonal()
    assert torch.allclose(found, values.diag(), atol=1e-4)
    assert values[s > 0.01 * s.max()].sub(1).abs().max() < 0.4


def test_a_step_is_as_large_in_every_direction_and_as_an_adamw_step():
    layer = nn.Linear(32, 16, bias=False)
    before = layer.weight.detach().clone()
    u, _, v = torch.linalg.svd(torch.randn(16, 32), full_matrices=False)
    layer.weight.grad = u @ torch.logspace(0, -3, 16).diag() @ v
    Muon([layer.weight], [layer.weight], lr=0.1, weight_decay=0).step()
    moved = before - layer.weight.detach()
    values = torch.linalg.svdvals(moved)
    assert values[10] > 0.5 * values[0]  # of the gradient's it is a hundredth
    assert moved.square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.3)


def test_what_counts_as_a_matrix():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.head.weight = self.words.weight
            self.mix = nn.Conv2d(6, 4, 1)
            self.deep = nn.Conv2d(6, 6, 3, groups=6)

    net = Net()
    assert [id(p) for p in matrices(net)] == [id(net.mix.weight)]


def test_fine_tuning_by_it_freezes_and_goes_on_to_the_same_result(tmp_path):
    pytest.importorskip("accelerate")
    _, small, x, y = problem()
    first, still = [p.detach().clone() for p in small.parameters()], []

    def tuned(folder, calls):
        model = problem()[1]

        def evaluate(current):
            if len(still) == calls:
                raise KeyboardInterrupt
            pairs = zip(first, current.parameters(), strict=True)
            still.append(sum(torch.equal(a, b) for a, b in pairs))
            return len(still)

        rankopt.finetune(
            model, in_batches(x, y), epochs=3, optimizer="muon", learning_rate=1e-2,
            freezing=Sequential(), evaluate=evaluate, folder=folder,
        )  # fmt: skip
        return snapshot(model)

    whole = tuned(None, 9)
    assert still[1] > 0 == still[2]  # weights that were frozen in the first epoch only
    still.clear()
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, 2)
    assert equal(whole, tuned(tmp_path, 9))
