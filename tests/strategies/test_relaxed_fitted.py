"""Decompositions whose factors are fitted anew for every rank, in searches on data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rankopt
from rankopt._decompositions import BranchedTucker
from rankopt._decompositions.rebuild import rebuild
from rankopt._model.layers import canonical_weight
from rankopt._search.opening import open_problem
from rankopt.budget import Budget
from rankopt.errors import ModelError, RankoptWarning
from rankopt.soft import SoftModel
from rankopt.strategy.relaxation import Relaxation
from rankopt.testing import planted_inputs, planted_model
from rankopt_strategies import Relaxed

FITTED = ("cp", "tt", "branched_tucker")


def soft_model(*methods):
    model = planted_model(noise=0.4)
    with torch.no_grad():
        problem = open_problem(
            model, Budget.parse("macs<=60%"), example_inputs=planted_inputs(), methods=methods
        ).problem
        problem.prepare()
        return model, SoftModel(model, Relaxation(problem))


def site_of(relaxation, name="conv"):
    return [menu.site.name for menu in relaxation.menus].index(name)


def certain(relaxation, site, place):
    """The first option of every site but one."""
    sure = torch.zeros(len(relaxation), dtype=torch.float64)
    sure[relaxation.starts] = 1
    start = relaxation.starts[site]
    sure[start] = 0
    sure[start + place] = 1
    return sure


@pytest.mark.parametrize("method", FITTED)
def test_a_certain_option_has_the_weight_of_its_own_fit(method):
    model, soft = soft_model("svd", method)
    relaxation = soft.relaxation
    site = site_of(relaxation)
    menu = relaxation.menus[site]
    place = next(i for i, found in enumerate(menu.methods) if found and found.name == method)
    place += (len(menu) - place) // 2
    chosen = menu.methods[place]
    with torch.no_grad(), soft.using(certain(relaxation, site, place)):
        found = soft.soft_weights()["conv.weight"]
    basis = relaxation.problem.basis(menu.site, chosen)
    ranks = menu.ranks[place]
    expected = rebuild(chosen, menu.site.layer, ranks, basis.factors(ranks))
    assert torch.allclose(found, expected.flatten(0, 1).to(found), atol=1e-6)
    dense = canonical_weight(model.get_submodule("conv"))
    lost = (dense.flatten(0, 1) - found).norm() / dense.norm()
    assert float(lost) == pytest.approx(basis.fitted_error(ranks), abs=1e-4)


@pytest.mark.parametrize("method", FITTED)
def test_a_mixture_leaves_out_what_its_options_leave_out(method):
    model, soft = soft_model(method)
    relaxation = soft.relaxation
    site = site_of(relaxation)
    menu, start = relaxation.menus[site], relaxation.starts[site]
    dense = canonical_weight(model.get_submodule("conv")).flatten(0, 1)
    weights = torch.rand(len(menu), generator=torch.Generator().manual_seed(0)).double()
    shares = torch.zeros(len(relaxation), dtype=torch.float64)
    shares[relaxation.starts] = 1
    shares[start : start + len(menu)] = weights / weights.sum()
    leaf = shares.requires_grad_()
    with soft.using(leaf):
        found = soft.soft_weights()["conv.weight"]
    lost = float((dense - found.detach()).norm() / dense.norm())
    mean = float(shares.detach()[start : start + len(menu)].numpy() @ menu.error)
    # What different fits leave out is not quite parallel, so that a mixture loses a little less.
    assert lost == pytest.approx(mean, rel=0.2)
    assert lost <= mean * (1 + 1e-4)
    (slopes,) = torch.autograd.grad((dense - found).square().sum(), leaf)
    slopes = slopes[start : start + len(menu)].numpy()
    # The larger the error of an option, the more its probability costs.
    assert np.corrcoef(slopes, menu.error)[0, 1] > 0.9


@pytest.mark.parametrize("method", FITTED)
def test_one_interpolated_option_leaves_out_its_own_error(method):
    model, soft = soft_model(method)
    relaxation = soft.relaxation
    site = site_of(relaxation)
    dense = canonical_weight(model.get_submodule("conv")).flatten(0, 1)
    menu = relaxation.menus[site]
    for place in range(0, len(menu) - 1, 1 + len(menu) // 8):
        # With a gradient there is no fit of the option's own.
        with soft.using(certain(relaxation, site, place).requires_grad_()):
            found = soft.soft_weights()["conv.weight"].detach()
        lost = float((dense - found).norm() / dense.norm())
        assert lost == pytest.approx(menu.error[place], rel=0.02)


@pytest.mark.parametrize("slopes", ["gradient", "measured"])
def test_every_decomposition_takes_part(slopes):
    model = planted_model(noise=0.4)
    data = [planted_inputs(32)]
    plan = rankopt.search(
        model,
        "macs<=45%",
        strategy=Relaxed(rounds=2, slopes=slopes),
        example_inputs=planted_inputs(),
        calibration=data,
        methods=("svd", *FITTED),
    )
    assert {decision.method for decision in plan.changes} & set(FITTED)
    facts = plan.extensions["relaxed"]
    assert facts["loss"] <= facts["first_loss"]
    assert plan.totals["macs"]["measured"] <= 0.45 * plan.totals["macs"]["before"]


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_that_train_are_seen_through_fits(method, calibrated):
    torch.manual_seed(0)
    model, x = planted_model(noise=0.4), planted_inputs(32)
    data = {"calibration": [x]} if calibrated else {}
    soft = rankopt.soften(model, "params<=70%", methods=("svd", method), **data)
    assert soft.build(soft.discretise()).eval()(x).isfinite().all()
    wanted = 1.5 * model.eval()(x).detach()
    optimiser = torch.optim.Adam(
        [{"params": soft.weights(), "lr": 1e-3}, {"params": soft.logits(), "lr": 0.05}]
    )
    soft.eval()
    before = {name: value.detach().clone() for name, value in soft.model.named_parameters()}
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = (soft(x) - wanted).square().mean()
        loss.backward()
        assert soft.model.get_submodule("conv").weight.grad.abs().sum() > 0
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    plan = soft.discretise()
    assert method in {decision.method for decision in plan.changes}
    small = soft.build(plan).eval()
    with torch.no_grad(), soft.using(soft._certain(plan)):
        # The factors are those of the trained weights, not fitted to the first ones.
        torch.testing.assert_close(small(x), soft(x), rtol=1e-3, atol=1e-4)
    trained = soft.model.get_submodule("conv").weight
    assert not torch.equal(trained, before["conv.weight"])


def test_a_fit_that_nothing_follows_is_left_out():
    truncated = BranchedTucker(init="truncate")
    with pytest.warns(RankoptWarning, match="branched_tucker left out: its factors cannot follow"):
        soft = rankopt.soften(planted_model(), "params<=80%", methods=("tucker2", truncated))
    assert {decision.method for decision in soft.discretise().changes} == {"tucker2"}
    with pytest.raises(ModelError, match="branched_tucker cannot follow a weight that trains"):
        rankopt.soften(planted_model(), "params<=60%", methods=(truncated,))
