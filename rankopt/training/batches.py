"""What a training loader may yield, taken apart and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from rankopt._model import measure
from rankopt._model.arguments import Arguments, misfit
from rankopt._model.inputs import batches, compared, entry, tensors_in
from rankopt._utils import seeding
from rankopt.errors import CalibrationError, ModelError, TrainingError

__all__ = [
    "Batch",
    "call",
    "check_labels",
    "fingerprint",
    "groups",
    "kept_sampler",
    "parts",
    "prepared",
    "random_sources",
    "right",
    "samples",
    "share",
    "split",
    "task_loss",
]

# Rows of tensors in memory that tell data sets apart.
FIRST: Final = 16
# Labels of this value are left out, as by torch's cross-entropy.
IGNORED: Final = -100
EXPECTED: Final = (
    "expected (inputs, labels), or a mapping of tensors with 'labels' as Hugging Face's models take"
)
Batch = tuple[Any, Any]


def split(model: nn.Module, batch: Any, *, labelled: bool, step: int, plain: bool = True) -> Batch:
    """(inputs, labels) of one batch; labels are None where none are used.

    Args:
        model: Its signature tells labels from inputs.
        batch: As the loader yields it.
        labelled: Whether labels are used.
        step: For messages.
        plain: Whether labels have to be a tensor, as without a loss of the user's own.

    Raises:
        TrainingError: The batch is of a type nothing can be done with.
    """
    if not labelled:
        try:
            ((inputs, _),) = batches(model, [batch], max_samples=None, name="train")
        except CalibrationError as error:
            raise TrainingError(f"step {step}: {error}") from error
        if isinstance(inputs, Mapping):  # labels would only make the model compute a loss
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        return inputs, None
    if isinstance(batch, Mapping) and "labels" in batch:
        return dict(batch), batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, labels = batch
        first = Arguments(model).packed(inputs)
        known = (Tensor, tuple, list, Mapping)
        if any(True for _ in tensors_in(inputs)) and isinstance(labels, Tensor if plain else known):
            return first, labels
        raise TrainingError(
            f"step {step}: train yielded a pair of {type(inputs[0]).__name__} and "
            f"{type(labels).__name__}; {EXPECTED}"
        )
    advice = (
        "to train without labels give a teacher and Distillation(labels=0, logits=1)"
        if not isinstance(batch, Mapping)
        else misfit(model, batch) or "name them 'labels'"
    )
    raise TrainingError(
        f"step {step}: train yielded a {type(batch).__name__} without labels; {EXPECTED}; {advice}"
    )


def call(model: nn.Module, inputs: Any, step: int) -> Any:
    """Run the model, saying at which step and on what it failed.

    Raises:
        TrainingError: The model does not take the inputs.
    """
    try:
        return measure.call(model, inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [f"{list(t.shape)} {t.dtype}" for t in tensors_in(inputs)]
        advice = misfit(model, inputs)
        if advice is not None and isinstance(inputs, tuple):
            advice += " beside the labels; map it, such as [(b[0], b[1]) for b in loader]"
        raise TrainingError(
            f"step {step}: the model fails on a batch of {', '.join(shapes)}: {error}"
            + ("" if advice is None else f"; {advice}")
        ) from error


def samples(inputs: Any) -> int:
    """Length of a batch; 1 where no tensor has one."""
    return next((len(t) for t in tensors_in(inputs) if t.dim()), 1)


def check_labels(labels: Tensor, output: Any, step: int) -> None:
    """Check class indices before a kernel, which may not name its reason, does.

    Raises:
        TrainingError: Labels of another number, type or range than the logits call for.
    """
    logits = compared(output)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TrainingError(
            f"step {step}: labels are {labels.dtype}; the default loss takes class indices of an "
            "integer type; pass loss= for anything else"
        )
    expected = (logits.shape[0], *logits.shape[2:]) if logits.dim() > 1 else ()
    if tuple(labels.shape) != expected:
        raise TrainingError(
            f"step {step}: labels are {list(labels.shape)}, but the logits {list(logits.shape)} "
            f"call for {list(expected)}; pass loss= for anything but class indices"
        )
    classes = logits.shape[1]
    bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if bad.numel():
        raise TrainingError(
            f"step {step}: label {int(bad[0])} is out of range for {classes} classes; labels "
            f"go from 0 to {classes - 1} ({IGNORED} is left out)"
        )


def task_loss(output: Any, labels: Any) -> Tensor:
    """The model's own loss where its output holds one, else cross-entropy."""
    own = entry(output, "loss")
    if own is not None:
        return own  # type: ignore[no-any-return]
    return F.cross_entropy(compared(output), labels.to(torch.int64), ignore_index=IGNORED)


def right(output: Any, labels: Any) -> tuple[Tensor, Tensor] | None:
    """(number of right classes, number of labels); None where labels are no classes."""
    try:
        logits = compared(output)
    except CalibrationError:
        return None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or logits.dim() < 2:
        return None
    if logits.shape[1] < 2:  # one value per sample, such as the logit of a yes
        return None
    if tuple(labels.shape) != (logits.shape[0], *logits.shape[2:]):
        return None
    counted = labels != IGNORED
    return (logits.detach().argmax(dim=1) == labels).sum(), counted.sum()


def prepared(train: Any, accelerator: Any, limit: int | None) -> tuple[Any, int]:
    """A loader for this process, and how many batches it has in an epoch.

    Args:
        train: As given by the user. One process reads it as it is; of several, each takes
            its turns, unless accelerate can split it, see `_splittable`.
        accelerator: Hugging Face's.
        limit: Largest number of batches; needed where `train` has no length.

    Raises:
        ModelError: No length and no limit.
        TrainingError: Not a batch for each process.
    """
    loader, processes = train, accelerator.num_processes
    if processes > 1 and _splittable(train):
        loader = accelerator.prepare_data_loader(train, device_placement=False)
        processes = 1
    length = _length(loader)
    count = None if length is None else length // processes
    if count is None and limit is None:
        raise ModelError(
            "train has no length, so the learning rate cannot be scheduled; pass batches_per_epoch="
        )
    found = min(n for n in (count, limit) if n is not None)
    if found < 1:
        raise TrainingError(f"train is empty: {accelerator.num_processes} process(es) get no batch")
    return loader, found


def _splittable(loader: Any) -> bool:
    """Whether accelerate can split a loader between processes without losing a part of it.

    It makes a DataLoader of its own class from the settings, with a sampler of its own in
    place of any RandomSampler.
    """
    if not isinstance(loader, DataLoader) or _splits(loader):
        return isinstance(loader, DataLoader)
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return (
        type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
        and all(
            type(one) is RandomSampler or not isinstance(one, RandomSampler) for one in samplers
        )
    )


def _splits(loader: Any) -> bool:
    """Whether a loader is accelerate's, which gives each process its own batches."""
    from accelerate.data_loader import DataLoaderStateMixin

    return isinstance(loader, DataLoader) and isinstance(loader, DataLoaderStateMixin)


@contextmanager
def kept_sampler(train: Any) -> Iterator[None]:
    """Leave a DataLoader the order it draws: `prepared` puts accelerate's sampler into it."""
    holders: list[Any] = [getattr(train, name, None) for name in ("batch_sampler", "sampler")]
    before = [(holder, holder.sampler) for holder in holders if hasattr(holder, "sampler")]
    try:
        yield
    finally:
        for holder, sampler in before:
            holder.sampler = sampler


def share(loader: Any, accelerator: Any) -> Iterator[Any]:
    """The batches of this process: of a list, every n-th, equally many for each of n."""
    if accelerator.num_processes == 1 or _splits(loader):
        yield from loader
        return
    iterator, processes = iter(loader), accelerator.num_processes
    while len(turn := list(islice(iterator, processes))) == processes:
        yield turn[accelerator.process_index]


def parts(train: Any) -> list[Any]:
    """A loader and what it draws its order from."""
    batch_sampler = getattr(train, "batch_sampler", None)
    inner = getattr(batch_sampler, "sampler", None)
    found = (train, getattr(train, "sampler", None), batch_sampler, inner)
    return list({id(part): part for part in found}.values())


def random_sources(train: Any) -> tuple[list[Any], list[Any]]:
    """Generators of its own that a loader draws its order from, and its samples.

    Those of the order have to be alike in all processes, as each takes its share of it.
    """
    data = getattr(train, "dataset", None)
    ordered = [data] if isinstance(data, IterableDataset) else []
    without = () if ordered else (Dataset,)
    order = seeding.random_sources([*parts(train), *ordered], without=without)
    known = {id(source) for source in order}
    every = seeding.random_sources([*parts(train), data])
    return order, [source for source in every if id(source) not in known]


def fingerprint(train: Any) -> str:
    """What tells one set of training data from another without drawing samples from it.

    The type and length of the data set or list; the first values of those held in memory. A
    sample drawn from any other may be another one each time, or open a file that workers share.
    """
    source = getattr(train, "dataset", train)
    count = _length(source)
    held = source.tensors if isinstance(source, TensorDataset) else source
    first = held if held is not source else held[0] if isinstance(held, list) and held else None
    digest = hashlib.sha256(f"{type(source).__name__} {count}".encode())
    for tensor in tensors_in(first):
        digest.update(measure.tensor_digest(tensor.detach()[:FIRST] if tensor.dim() else tensor))
    return digest.hexdigest()[:16]


def _length(source: Any) -> int | None:
    """None where it has none, or cannot tell, as a ChainDataset of streams."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def groups(loader: Iterable[Any], size: int, limit: int) -> Iterator[list[Any]]:
    """The first `limit` batches in groups of `size`, one optimiser step each."""
    iterator = islice(loader, limit)
    while group := list(islice(iterator, size)):
        yield group


def check_iterable(train: Any) -> None:
    """Check what the user gave as `train`.

    Raises:
        ModelError: It is no iterable of batches that can be read several times.
    """
    if isinstance(train, (Tensor, str, bytes, Mapping)) or not isinstance(train, Iterable):
        raise ModelError(
            f"train is a {type(train).__name__}; give a DataLoader or a list of batches: {EXPECTED}"
        )
    if isinstance(train, Iterator):
        raise ModelError(
            "train can be read only once, but every epoch reads it anew; give a DataLoader or a "
            "list of batches"
        )
