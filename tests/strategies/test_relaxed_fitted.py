"""Decompositions whose factors are fitted anew for every rank, in searches on data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rankopt
from rankopt._open import open_problem
from rankopt.budget import Budget
from rankopt.decompositions.rebuild import rebuild
from rankopt.errors import ModelError, RankoptWarning
from rankopt.layers import canonical_weight
from rankopt.relaxation import Relaxation
from rankopt.soft import SoftModel
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


def test_weights_that_train_cannot_be_seen_through_fits():
    with pytest.warns(RankoptWarning, match="cp, tt left out: factors that are fitted anew"):
        soft = rankopt.soften(planted_model(), "params<=80%", methods=("tucker2", "cp", "tt"))
    assert {decision.method for decision in soft.discretise().changes} == {"tucker2"}
    with pytest.raises(ModelError, match="cp cannot mix ranks of a weight that trains"):
        rankopt.soften(planted_model(), "params<=60%", methods=("cp",))
