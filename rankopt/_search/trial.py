"""One built model for many candidates: chains are swapped in, BatchNorm settled, `evaluate` run."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._build.asymmetric import fitted_in_order
from rankopt._build.chains import Filling, chains_of, steps_of
from rankopt._build.settle import NormSettler
from rankopt._decompositions.base import Decomposition
from rankopt._model import measure, surgery
from rankopt._model.metric import Evaluate, EvaluateBatch, mean, parsed
from rankopt.errors import EvaluationError
from rankopt.plan import FISHER, KEEP, Decision, RankPlan
from rankopt.strategy import Problem, Site

__all__ = ["TrialModel"]

# Chains of earlier candidates are kept up to this size, for they come again.
CHAIN_BYTES: Final = 512 * 2**20
_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TrialModel:
    """Evaluates candidate decisions on one model that is built once.

    A candidate differs from the one before in some sites; only their chains are made,
    from bases that were factorised before, and swapped in. The model a user's
    `evaluate` sees is a private copy.

    Args:
        problem: Gives sites and bases.
        view: The unpacked clone the problem describes; not changed.
        evaluate: ``evaluate(model)`` gives the metric, or yields it batch by batch: a
            number, or a pair of number and weight. With `batches`,
            ``evaluate(model, batch)`` gives it for one batch.
        batches: What to evaluate on, the same for every candidate.
        held: Calibration batches to settle BatchNorm on; None leaves it alone.

    Raises:
        ModelError: The model cannot be copied.
    """

    def __init__(
        self,
        problem: Problem,
        view: nn.Module,
        evaluate: Evaluate | EvaluateBatch,
        *,
        batches: Sequence[Any] | None = None,
        held: Sequence[Any] | None = None,
    ) -> None:
        self._problem, self._batches = problem, batches
        self._evaluate: Callable[..., Any] = evaluate
        self._dense, self._held = surgery.clone(view).eval(), held
        self._settler = None if held is None else NormSettler(self._dense, held)
        self._sites = {site.name: site for site in problem.sites}
        self._renew()

    def _renew(self) -> None:
        """A fresh copy of the dense model."""
        self._root = surgery.clone(self._dense)
        named = dict(surgery.named_modules(self._root))
        self._modules = {
            layer.name: named[layer.name] for site in self._sites.values() for layer in site.layers
        }
        self._standing = {name: (KEEP, dict(self._modules_of(name))) for name in self._sites}
        self._norms = [(buffer, buffer.clone()) for buffer in self._root.buffers()]
        self._chains: OrderedDict[tuple[str, str], dict[str, nn.Module]] = OrderedDict()
        self._bytes = 0

    def build(self, decisions: Iterable[Decision]) -> nn.Module:
        """The model with the decisions carried out; the next call changes it again.

        Args:
            decisions: Of a plan of this problem; sites they leave out stay dense.
        """
        wanted = {decision.targets[0]: decision for decision in decisions if not decision.keeps}
        plan, fitted = "", dict[str, nn.Module]()
        if any(decision.factors.asymmetric for decision in wanted.values()):
            # Each chain depends on those before it.
            plan = repr([(name, _key(decision)) for name, decision in wanted.items()])
            if any(self._standing[name][0] != _key(d) + plan for name, d in wanted.items()):
                fitted = self._fitted_in_order(list(wanted.values()))
        swaps: dict[nn.Module, nn.Module] = {}
        for name, site in self._sites.items():
            decision = wanted.get(name)
            key = KEEP if decision is None else _key(decision) + plan
            standing, old = self._standing[name]
            if key == standing:
                continue
            new: Mapping[str, nn.Module]
            if decision is None:
                new = self._modules_of(name)
            elif plan:
                new = {layer.name: fitted[layer.name] for layer in site.layers}
            else:
                new = self._chain(site, decision, key)
            swaps.update({old[layer]: new[layer] for layer in old})
            self._standing[name] = (key, dict(new))
        with torch.no_grad():
            self._root = surgery.replace(self._root, swaps) if swaps else self._root
            for buffer, value in self._norms:
                buffer.copy_(value)
        if wanted and self._settler is not None:
            self._settler.settle(self._root)
        return self._root

    def _fitted_in_order(self, decisions: Sequence[Decision]) -> dict[str, nn.Module]:
        """Layer name to chain, for a plan all of whose factors are asymmetric."""
        assert self._held is not None
        steps = steps_of(self._dense, RankPlan(model={}, decisions=tuple(decisions)))
        known = {
            name: self._problem.known(self._sites[name], True)
            for name in (d.targets[0] for d in decisions if d.factors.fisher)
        }
        pairs = ((name, m.output_root) for name, m in known.items() if m is not None)
        roots = {name: root for name, root in pairs if root is not None}
        with torch.no_grad():
            student = surgery.clone(self._dense, share=self._dense.parameters())
            return fitted_in_order(self._dense, student, steps, self._held, roots, progress=False)

    def _modules_of(self, name: str) -> Mapping[str, nn.Module]:
        return {layer.name: self._modules[layer.name] for layer in self._sites[name].layers}

    def _chain(self, site: Site, decision: Decision, key: str) -> dict[str, nn.Module]:
        place = (site.name, key)
        if place in self._chains:
            self._chains.move_to_end(place)
            return self._chains[place]
        made = chains_of(
            decision,
            site.layers,
            [self._modules[layer.name] for layer in site.layers],
            partial(self._filling, site, decision.factors.fisher),
        )
        self._chains[place] = made
        self._bytes += _size(made)
        standing = {(name, key) for name, (key, _) in self._standing.items()}
        for old in [old for old in self._chains if old != place and old not in standing]:
            if self._bytes <= CHAIN_BYTES:
                break
            self._bytes -= _size(self._chains.pop(old))
        return made

    def _filling(
        self, site: Site, fisher: bool, method: Decomposition, ranks: Sequence[int]
    ) -> Filling:
        factors = self._problem.basis(site, method, fisher=fisher).factors(ranks)
        return Filling.of(factors, self._problem.known(site, fisher))

    def metric(self, decisions: Iterable[Decision]) -> float:
        """The metric of the candidate, the weighted mean over its batches; see `values`."""
        return mean(list(self.values(decisions)))

    def values(self, decisions: Iterable[Decision]) -> Iterator[tuple[float, float]]:
        """Yield (metric, weight) for each batch, one pair where `evaluate` gives one number.

        Runs in eval mode without gradients; modes and random generators are as before
        whenever it stops.

        Raises:
            EvaluationError: `evaluate` raised, gave no finite number, or changed the model.
        """
        model = self.build(decisions)
        before = _state(model)
        count = 0
        try:
            with torch.no_grad(), measure.preserve_rng(), measure.evaluation(model):
                for value in self._run(model):
                    yield parsed(value)
                    count += 1
        except EvaluationError:
            raise
        except Exception as error:
            raise EvaluationError(f"evaluate raised {type(error).__name__}: {error}") from error
        finally:
            changed = _state(model) != before
            if changed:
                self._renew()
        if changed:
            raise EvaluationError(
                "evaluate changed the model (weights, buffers, modules or hooks); its figure is "
                "not counted: let it work on a copy, or leave the model as it was"
            )
        if not count:
            raise EvaluationError("evaluate yielded no value; expected at least one batch")

    def _run(self, model: nn.Module) -> Iterator[Any]:
        if self._batches is not None:
            for batch in self._batches:
                yield self._evaluate(model, batch)
            return
        result = self._evaluate(model)
        if isinstance(result, Iterator):
            yield from result
        else:
            yield result


def _key(decision: Decision) -> str:
    args = json.dumps(dict(decision.args), sort_keys=True)
    return f"{decision.method}{args}{FISHER * decision.factors.fisher}"


def _size(chains: Mapping[str, nn.Module]) -> int:
    unique = {id(p): p for chain in chains.values() for p in chain.parameters()}
    return sum(p.numel() * p.element_size() for p in unique.values())


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What must be the same before and after `evaluate`; sums of bits on the model's device."""
    modules = [
        (id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ]
    tensors = [*model.parameters(), *model.buffers()]
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in (part for held in tensors for part in measure.dense_parts(held.detach())):
        if tensor.numel() and not tensor.is_complex():
            bits = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
            sums.setdefault(tensor.device, []).append(bits.sum(dtype=torch.int64))
    totals = [torch.stack(values).tolist() for values in sums.values()]
    return modules, [id(tensor) for tensor in tensors], totals
