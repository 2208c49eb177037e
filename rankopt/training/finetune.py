"""finetune(): train a compressed model on labelled data, on Hugging Face accelerate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from rankopt._model import measure, surgery
from rankopt._model.metric import Evaluate
from rankopt._utils.arguments import check_integer
from rankopt.errors import ModelError
from rankopt.training.augmentation import augmentation
from rankopt.training.batches import check_iterable, kept_sampler
from rankopt.training.distillation import Distillation, check_trainable
from rankopt.training.freezing import release
from rankopt.training.launcher import accelerated
from rankopt.training.loop import Loop
from rankopt.training.recipe import MakeOptimizer, Recipe
from rankopt.training.schedules import Schedule

__all__ = ["Training", "check_request", "finetune"]


@dataclass(frozen=True)
class Training:
    """What a fine-tuning run did.

    Args:
        history: One mapping per epoch: ``epoch``, ``step``, ``loss``, ``accuracy`` (percent, in
            training; None where labels are no classes), ``metric`` (of `evaluate`; else
            None), ``learning_rate``, ``samples_per_second``, ``seconds``, ``frozen`` (how many
            parameters the freezing kept from training), and ``terms`` of the loss.
        best_epoch: The epoch whose weights the model now has; -1 for those it started with.
        metric: `evaluate` of the weights the model now has; None without `evaluate`.
        before: `evaluate` of the weights it started with.
        seconds: Wall-clock time of all epochs, those before a resumption included.
        stopped: ``done``, or ``patience`` if `evaluate` had stopped improving.
    """

    history: tuple[dict[str, Any], ...]
    best_epoch: int
    metric: float | None
    before: float | None
    seconds: float
    stopped: str

    def __str__(self) -> str:
        last = self.history[-1]
        spent = f"{last['step']} steps, {self.seconds:.0f} s"
        epochs = f"{len(self.history)} epoch" + "s" * (len(self.history) != 1)
        parts = [f"fine-tuned for {epochs} ({spent})"]
        if last["accuracy"] is not None:
            parts.append(f"training accuracy {last['accuracy']:.2f}%")
        if self.metric is not None:
            where = f"after epoch {self.best_epoch + 1}"
            if self.best_epoch < 0:
                where = "as before: no epoch was better, so the weights are as they were"
            elif self.before is not None:
                where += f" ({self.before:.4g} before)"
            parts.append(f"metric {self.metric:.4g} {where}")
        if self.stopped == "patience":
            parts.append("stopped early")
        return ", ".join(parts)


@measure.outside_inference_mode
@measure.no_autocast()
def finetune(
    model: nn.Module,
    train: Any,
    *,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    freezing: str | Schedule = "none",
    freezing_steps: int | None = None,
    final_epochs: int = 0,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    optimizer: str | MakeOptimizer = "adamw",
    weight_decay: float = 1e-4,
    schedule: str = "cosine",
    warmup: float | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    evaluate: Evaluate | None = None,
    patience: int | None = None,
    accumulate: int = 1,
    clip: float | None = 1.0,
    ema: float | None = None,
    precision: str = "no",
    augment: Any = "none",
    batches_per_epoch: int | None = None,
    folder: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Training:
    """Train a compressed model in place.

    Runs in one process where the model is, or in several under ``torchrun`` and
    ``accelerate launch``, each on its own device and its own part of a DataLoader. Modes and
    the global random generators are as before afterwards.

    Args:
        model: From `rankopt.apply` or `rankopt.load`; any other model without freezing.
        train: A DataLoader or a list of (inputs, labels), or of mappings with ``labels``. Workers
            start anew every epoch, ``persistent_workers`` too, so that a run resumes alike.
        teacher: The dense model; adds `distillation` to the loss. Not changed.
        distillation: Terms and weights; None with a teacher takes `Distillation()`.
            ``Distillation(labels=0, logits=1)`` trains without labels.
        freezing: ``none``, ``fixed``, ``sequential`` or a `rankopt.training.Schedule`, such as
            ``Sequential().front("layer1", 7)``.
        freezing_steps: Optimiser steps per phase of the freezing schedule; None for one epoch.
        final_epochs: Epochs at the end in which all factors train; a front that `freezing` freezes
            by then does not.
        epochs: How often to go through `train`.
        learning_rate: At its peak.
        optimizer: ``adamw``, ``sgd`` (Nesterov 0.9), or a function of the parameters.
        weight_decay: Of ``adamw`` and ``sgd``.
        schedule: Of the learning rate: ``cosine``, ``one-cycle`` or ``constant``.
        warmup: Share of all steps in which the rate rises; None for 0.05 (cosine), 0.3
            (one-cycle) or 0 (constant).
        loss: Of (output, labels); None for the model's own loss or cross-entropy.
        evaluate: The metric of a model, higher is better, after every epoch and before the
            first; the best weights are kept, those it started with included. Without
            it those of the last epoch. NaN is worse than any number.
        patience: Stop after this many epochs without a better metric.
        accumulate: Batches per optimiser step.
        clip: Largest gradient norm; None for no clipping.
        ema: Decay per step of an exponential moving average of the weights, which is
            what is evaluated and kept, with BatchNorm statistics of its own from the last 512
            samples of each epoch; None for none.
        precision: ``no``, ``bf16`` or ``fp16`` autocast.
        augment: Changes inputs before model and teacher see them: a function of (inputs,
            generator), ``auto`` (shifts and mirrors images, the one tensor of four dimensions
            among the inputs) or ``none``.
        batches_per_epoch: Where `train` has no length; where it has, an upper bound.
        folder: For a checkpoint and a record (``record.jsonl``) after every epoch. A run in a
            folder with a checkpoint goes on from it, and ends as if never interrupted.
            Generators that `train`, its samplers or data set hold in attributes begin anew every
            epoch; what a closure holds, and other state of a data set, is not known.
        seed: Orders the batches of a DataLoader, seeds dropout and augmentation.
        progress: Whether to show a progress bar; None decides by the terminal.

    Returns:
        The history, and which epoch's weights the model has.

    Raises:
        ValueError: A setting out of range, or without another that it needs.
        ModelError: `model` or `teacher` is no module, `train` cannot be read every epoch, nothing
            in the model trains, or float16 parameters do; no plan to freeze by, or no module of a
            name in `freezing`; or a teacher without the layers or with other outputs.
        EvaluationError: `evaluate` raised, or gave no number.
        TrainingError: A batch it cannot use, or a loss that is not finite; the model then
            has the weights of the last complete epoch.
        CheckpointError: The folder holds another run, or a damaged checkpoint.
        RankoptError: The folder cannot be made.
        MissingDependency: accelerate is not installed.

    Example:
        >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
        >>> train = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(4)]
        >>> done = rankopt.finetune(small, train, teacher=dense, freezing="sequential", epochs=2)
        >>> [epoch["frozen"] for epoch in done.history]
        [1, 1]
    """
    surgery.check_model(model, swapped=train)
    if teacher is not None:
        surgery.check_model(teacher, "teacher")
    release(model)
    recipe = check_request(
        model,
        train,
        epochs=epochs,
        learning_rate=learning_rate,
        optimizer=optimizer,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        accumulate=accumulate,
        clip=clip,
        ema=ema,
        patience=patience,
        precision=precision,
        freezing=freezing,
        freezing_steps=freezing_steps,
        final_epochs=final_epochs,
        seed=seed,
        teacher=teacher,
        distillation=distillation,
        loss=loss,
        evaluate=evaluate,
        augment=augment,
        batches_per_epoch=batches_per_epoch,
    )
    if teacher is not None and distillation is None:
        distillation = Distillation()
    with kept_sampler(train), accelerated(model, recipe) as accelerator:
        loop = Loop(
            model,
            train,
            accelerator,
            recipe,
            teacher=teacher,
            distillation=distillation,
            loss=loss,
            evaluate=evaluate,
            augment=augment,
            batches_per_epoch=batches_per_epoch,
            folder=folder,
            progress=progress,
        )
        stopped = loop.run()
    seconds = math.fsum(epoch["seconds"] for epoch in loop.history)
    return Training(
        tuple(loop.history), loop.best_epoch, loop.best_metric, loop.before, seconds, stopped
    )


def check_request(model: nn.Module | None, train: Any, **settings: Any) -> Recipe:
    """The recipe, if `finetune` can do what it is asked to.

    Args:
        model: None where it is not known yet.
        train: As given to `finetune`.
        settings: Likewise; those that are left out have its defaults.

    Raises:
        ValueError: A setting out of range, or without another that it needs.
        ModelError: Data that cannot be read every epoch, or nothing to train.
    """
    defaults = {name: p.default for name, p in inspect.signature(finetune).parameters.items()}
    given = {**defaults, **settings}
    recipe = Recipe(**{field.name: given[field.name] for field in fields(Recipe)})
    check_iterable(train)
    augmentation(given["augment"])
    if given["batches_per_epoch"] is not None:
        check_integer("batches_per_epoch", given["batches_per_epoch"], 1)
    terms, loss = given["distillation"], given["loss"]
    if not (terms is None or isinstance(terms, Distillation)):
        raise ValueError(f"distillation={terms!r}: expected a rankopt.training.Distillation")
    if not (loss is None or callable(loss)):
        raise ValueError(f"loss={loss!r}: expected a function of (output, labels)")
    if given["teacher"] is None and terms is not None:
        raise ValueError("distillation= needs teacher=, the dense model to learn from")
    unlabelled = terms is not None and not terms.labels
    if loss is not None and unlabelled:
        raise ValueError("loss= is of labels, which Distillation(labels=0) does not use; drop one")
    if given["patience"] is not None and given["evaluate"] is None:
        raise ValueError("patience= needs evaluate=, the metric that is to improve")
    if model is not None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("finetune has nothing to train: every parameter has requires_grad=False")
    if model is not None:
        check_trainable(model, "finetune")
    return recipe
