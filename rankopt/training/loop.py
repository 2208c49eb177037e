"""The training loop of `rankopt.finetune`."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.metric import Evaluate, metric_of
from rankopt._model.spelled import spelled
from rankopt._utils.arguments import check_integer
from rankopt._utils.files import check_writable
from rankopt._utils.progress import progress_bar
from rankopt.errors import TrainingError, warn
from rankopt.training import batches as data
from rankopt.training import state as files
from rankopt.training.distillation import Distillation, Distiller
from rankopt.training.exchange import Exchange
from rankopt.training.failures import not_finite, overflowing, warn_of_another
from rankopt.training.freezing import Freezer
from rankopt.training.objective import Objective, so_far
from rankopt.training.recipe import Recipe
from rankopt.training.schedules import NoFreezing
from rankopt.training.streams import Streams

__all__ = ["Loop"]

# Steps between two updates of the figures beside the progress bar: reading them waits
# for the device.
NOTE_EVERY: Final = 10
# Steps in a row without an update: float16's scale began at 2^16 and is below 2^-16 by then.
MOST_SKIPPED: Final = 32


class Loop:
    """One run; see `rankopt.finetune` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        train: Iterable[Any],
        accelerator: Any,
        recipe: Recipe,
        *,
        teacher: nn.Module | None,
        distillation: Distillation | None,
        loss: Callable[[Any, Any], Any] | None,
        evaluate: Evaluate | None,
        augment: Any,
        batches_per_epoch: int | None,
        folder: Any,
        progress: bool | None,
    ) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.given, self.plain = model, surgery.unwrap(model)
        self.evaluate = evaluate
        self.progress = progress if accelerator.is_main_process else False
        self.folder: Path | None = None if folder is None else files.make_folder(folder)
        if self.folder is not None and accelerator.is_main_process:
            check_writable(self.folder / files.CHECKPOINT)
        self.plain.to(accelerator.device)
        if batches_per_epoch is not None:
            check_integer("batches_per_epoch", batches_per_epoch, 1)
        self.loader, self.batches = data.prepared(train, accelerator, batches_per_epoch)
        self.streams = Streams(recipe.seed, self.loader, accelerator)
        self.steps_per_epoch = -(-self.batches // recipe.accumulate)
        # Optimisers are made before anything is frozen, so that they know every factor.
        parameters = [p for p in self.plain.parameters() if p.requires_grad]
        self.optimizer = accelerator.prepare_optimizer(recipe.make_optimizer(parameters))
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.parameters = parameters
        names = [name for name, p in self.plain.named_parameters() if p.requires_grad]
        self.trainable = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
        self.schedule = recipe.freezing_schedule(self.steps_per_epoch)
        self.freezer = None
        if not isinstance(self.schedule, NoFreezing):
            self.freezer = Freezer(self.plain, self.schedule)
        self.distiller = None
        if teacher is not None:
            self.distiller = Distiller(self.plain, teacher, distillation)
        self.objective = Objective(
            self.plain, accelerator, loss, augment, self.distiller,
            labelled=distillation is None or distillation.labels > 0,
        )  # fmt: skip
        self.average = recipe.make_average(self.plain)
        self.exchange = Exchange(self.given, self.plain, accelerator)
        self.history: list[dict[str, Any]] = []
        self.best_epoch = -1  # the weights it started with
        self.best: dict[str, Any] | None = None
        self.before: float | None = None
        self.step = 0
        self.skipped = 0  # in a row
        self.origin: dict[str, str | None] = {}
        self.began_with = ""
        if self.folder is not None:  # digests of large models take seconds
            self.origin["train"] = data.fingerprint(train)
            self.origin["teacher"] = None if teacher is None else measure.weights_digest(teacher)
            self.began_with = self._digest()

    # Set-up

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be gone on with."""
        recipe = self.recipe
        return {
            **files.fingerprint(self.plain),
            "optimizer": type(self.optimizer.optimizer).__name__,
            "epochs": recipe.epochs,
            "learning_rate": self.peaks,
            "weight_decay": [g.get("weight_decay") for g in self.optimizer.param_groups],
            "momentum": [g.get("momentum", g.get("betas")) for g in self.optimizer.param_groups],
            "clip": recipe.clip,
            "trainable parameters": self.trainable,
            "schedule": recipe.schedule,
            "warmup": recipe.warmup,
            "freezing": spelled(self.schedule),
            "freezing_steps": recipe.freezing_steps,
            **self.objective.identity,
            # It may begin or end midway, but metrics of two kinds cannot be compared.
            **({} if self.evaluate is None else {"evaluate": spelled(self.evaluate)}),
            "accumulate": recipe.accumulate,
            "ema": recipe.ema,
            "precision": recipe.precision,
            "seed": recipe.seed,
            "batches_per_epoch": self.batches,
            **self.origin,
            "processes": self.accelerator.num_processes,
        }

    # Running

    def run(self) -> str:
        """All epochs; returns why it ended."""
        modes = [(module, module.training) for module in self.plain.modules()]
        stack = ExitStack()
        stack.enter_context(measure.preserve_rng())
        stack.enter_context(torch.enable_grad())
        if self.distiller is not None:
            stack.enter_context(self.distiller)
            if surgery.is_compiled(self.given):  # compiled before there were hooks
                torch.compiler.reset()
        good: dict[str, Tensor] | None = None
        given, finished = self.began_with, False
        try:
            with stack:
                if self.folder is not None and self.accelerator.is_main_process:
                    stack.enter_context(files.sole(self.folder))
                    files.check_kept(self.plain, self.optimizer.optimizer)
                good = files.copied(self.plain)
                self._resume()
                if not self.history:
                    self._start()
                finished = len(self.history) >= self.recipe.epochs or self._impatient()
                while len(self.history) < self.recipe.epochs and not self._impatient():
                    good = files.copied(self.plain)
                    self._epoch(len(self.history))
                    self._finish_epoch()
                good = self._final()
        finally:
            try:
                # Complete, or what the last complete epoch left: never half an epoch.
                if good is not None:
                    files.put_back(self.plain, good)
            finally:
                if self.freezer is not None:
                    self.freezer.release()
                for module, mode in modes:
                    module.training = mode
                self.plain.zero_grad(set_to_none=True)
        if finished and given not in (self.began_with, self._digest()):
            warn_of_another(self.folder)
        return "patience" if len(self.history) < self.recipe.epochs else "done"

    def _digest(self) -> str:
        return "" if self.folder is None else measure.weights_digest(self.plain)

    def _start(self) -> None:
        """The metric to beat: a run never ends with worse weights than it was given."""
        self.before = self._evaluated(self.plain)
        if self.before is not None:
            self.best = files.copied(self.plain)

    def _epoch(self, epoch: int) -> None:
        self.plain.train()
        generator = self.streams.augmentation(epoch)
        # Sums over the epoch, on the device: loss, right, labels, samples.
        device = self.accelerator.device
        precise = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.zeros(4, device=device, dtype=precise)
        terms: dict[str, Tensor] = {}
        started = time.perf_counter()
        label = f"epoch {epoch + 1}/{self.recipe.epochs}"
        processes = self.accelerator.num_processes
        batches = self.streams.batches(epoch)
        taken = 0
        with progress_bar(label, self.steps_per_epoch, enabled=self.progress) as advance:
            for group in data.groups(batches, self.recipe.accumulate, self.batches):
                self._freeze(epoch)
                self._set_rate()
                self._step(group, generator, totals, terms)
                taken += 1
                advance(so_far(totals, started) if taken % NOTE_EVERY == 1 else None)
        if not taken:
            raise TrainingError(f"train yielded no batch in epoch {epoch + 1}")
        if taken < self.steps_per_epoch:
            warn(
                f"train yielded {taken} steps in epoch {epoch + 1} where {self.steps_per_epoch} "
                "were announced, so that the learning rate falls too late; pass the true number "
                "as batches_per_epoch="
            )
        if self.average is not None:
            self.average.settle(self.plain)
        if processes > 1:  # each has seen other batches; statistics are those of the first
            averaged = [] if self.average is None else self.average.buffers()
            for buffer in chain(self.plain.buffers(), averaged):
                torch.distributed.broadcast(buffer, 0)
        seconds = time.perf_counter() - started
        totals = self.accelerator.reduce(totals, "sum")
        loss, right, labels, samples = totals.tolist()
        self.history.append(
            {
                "epoch": epoch,
                "step": self.step,
                "loss": loss / max(samples, 1),
                "terms": {name: value.item() / taken for name, value in terms.items()},
                "accuracy": 100 * right / labels if labels else None,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "frozen": len(self.freezer.frozen) if self.freezer is not None else 0,
                "samples_per_second": samples / seconds,
                "seconds": seconds,
            }
        )

    def _freeze(self, epoch: int) -> None:
        """Bring the freezing, and what exchanges gradients, up to date."""
        by_step = self.recipe.freezing_steps is not None
        if self.freezer is not None and self.freezer.step(self.step if by_step else epoch):
            self.exchange.renew()

    def _set_rate(self) -> None:
        factor = self.recipe.rate(self.step, self.recipe.epochs * self.steps_per_epoch)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):  # as a capturable optimiser wants it
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor

    def _step(
        self,
        group: list[Any],
        generator: torch.Generator,
        totals: Tensor,
        terms: dict[str, Tensor],
    ) -> None:
        """One optimiser step over a group of batches."""
        accelerator, finite = self.accelerator, self._gradients(group, generator, totals, terms)
        norm = accelerator.clip_grad_norm_(self.parameters, self.recipe.clip or float("inf"))
        if self.recipe.precision != "fp16":  # there the scaler skips steps that overflow
            finite = finite * norm.isfinite()
        if not bool(accelerator.reduce(finite, "sum") == accelerator.num_processes):
            raise not_finite(self.step, len(self.history), self.folder)
        self.optimizer.step()
        self.skipped = self.skipped + 1 if self.optimizer.step_was_skipped else 0
        if self.skipped >= MOST_SKIPPED:
            raise overflowing(self.step, self.skipped)
        self.step += 1
        if self.average is not None:
            self.average.update(self.plain)

    def _gradients(
        self,
        group: list[Any],
        generator: torch.Generator,
        totals: Tensor,
        terms: dict[str, Tensor],
    ) -> Tensor:
        """Gradients of a group of batches; 1 if every loss was finite, else 0."""
        self.optimizer.zero_grad(set_to_none=True)
        finite = torch.ones((), device=self.accelerator.device)
        for index, batch in enumerate(group):
            with self.exchange.without(silent=index < len(group) - 1):
                model = self.exchange.model
                loss, parts, inputs = self.objective.of(model, batch, self.step, generator, totals)
                self.accelerator.backward(loss / len(group))
            if self.average is not None:
                self.average.see(inputs)
            finite = finite * loss.detach().isfinite()
            for name, value in parts.items():
                terms[name] = terms.get(name, 0.0) + value / len(group)
        self.exchange.finish()
        return finite

    # After an epoch

    @property
    def _current(self) -> nn.Module:
        """The model to evaluate and keep."""
        return self.plain if self.average is None else self.average.model

    def _finish_epoch(self) -> None:
        entry = self.history[-1]
        metric = entry["metric"] = self._evaluated(self._current)
        best = self.best_metric
        # NaN is worse than any number, and no better than NaN.
        if metric is None or best is None or metric > best or math.isnan(best) > math.isnan(metric):
            self.best_epoch = entry["epoch"]
            self.best = None if metric is None else files.copied(self._current)
        if self.folder is None or not self.accelerator.is_main_process:
            return
        scaler = getattr(self.accelerator, "scaler", None)
        files.save_state(
            self.folder,
            self._identity(),
            {
                "step": self.step,
                "history": self.history,
                "before": self.before,
                "began_with": self.began_with,
                "best_epoch": self.best_epoch,
                "best": self.best,
                "model": files.held(self.plain),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            },
        )
        files.write_record(self.folder, self._identity(), self.history)

    @property
    def best_metric(self) -> float | None:
        """`evaluate` of the weights to end with."""
        found: float | None
        found = self.before if self.best_epoch < 0 else self.history[self.best_epoch]["metric"]
        return found

    def _evaluated(self, model: nn.Module) -> float | None:
        if self.evaluate is None:
            return None
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(model):
            # NaN is a metric here: of a model that is broken, and no bar to any other.
            value = metric_of(self.evaluate, model, finite=False)
        if self.accelerator.num_processes > 1:  # all must agree on what is best
            shared = torch.tensor(value, device=self.accelerator.device, dtype=torch.float64)
            torch.distributed.broadcast(shared, 0)
            value = float(shared)
        return value

    def _impatient(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and len(self.history) - 1 - self.best_epoch >= patience

    def _final(self) -> dict[str, Any]:
        """The weights to end with."""
        return self.best if self.best is not None else files.copied(self._current)

    def _resume(self) -> None:
        if self.folder is None:
            return
        saved = files.load_state(self.folder, self._identity())
        if saved is None:
            return
        self.began_with = saved["began_with"]
        files.put_back(self.plain, saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
        self.step, self.history = saved["step"], saved["history"]
        self.before = saved["before"]
        if self.accelerator.is_main_process:  # it may have been killed between the two files
            files.write_record(self.folder, self._identity(), self.history)
        self.best_epoch, self.best = saved["best_epoch"], saved["best"]
