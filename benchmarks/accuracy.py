"""Accuracy after fine-tuning a compressed network, beside the dense control by the same recipe.

Run: python -m benchmarks.accuracy NETWORK [VARIANT ...] [--folder FOLDER] [--epochs 15] …
Networks: resnet20 (CIFAR-10, 30% of the MACs, comes trained), vgg (VGG-16-BN, Fashion-MNIST padded
to 32 x 32, 15%), vgg-cifar (the same on CIFAR-10) and vit (Fashion-MNIST, 50%). Variants, in order:
  dense       train the network (all but resnet20)
  start       search, apply, recover
  control     fine-tune the dense network
  full, fixed, sequential     fine-tune the compressed one with this freezing
  table       print what is finished
Left out, all but ``fixed``. Any run can be killed: the same command goes on from its
last complete epoch. One teacher, the dense network before fine-tuning, and one recipe serve all
variants, the control too. ``--held`` trains on nine tenths of the training images and scores the
rest: choose a recipe by that (but the ResNet-20 comes trained on all of them, so there it tells
recipes apart, not how far the control is). Without it the test images are scored once, at the end.
CIFAR-10: see `benchmarks.cifar.data_folder`; Fashion-MNIST: Debian's dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rankopt
from benchmarks import cifar, unseen
from benchmarks.unseen import ViT
from rankopt._commands.specs import parse_front
from rankopt._utils.files import atomic_path, write_text
from rankopt._utils.tables import table, to_text
from rankopt.training import FREEZING, Distillation, Schedule
from rankopt.training.augmentation import shift_and_mirror

CALIBRATION = 1024
BATCH = 128
VARIANTS = ("dense", "start", "control", "full", "fixed", "sequential", "table")
Data = tuple[Tensor, Tensor]


def cifar10() -> tuple[Data, Data]:
    return cifar.images("train", 0, 5000), cifar.images("val", 0, 500)


def fashion() -> tuple[Data, Data]:
    return unseen.images(unseen.FOLDER, "train"), unseen.images(unseen.FOLDER, "t10k")


def padded_fashion() -> tuple[Data, Data]:
    """32 x 32, as VGG-16 halves the side five times."""
    seen, test = (
        (nn.functional.pad(x, (2, 2, 2, 2), value=float(x.min())), y) for x, y in fashion()
    )
    return seen, test


def vgg16(channels: int, width: int) -> nn.Sequential:
    """VGG-16 with BatchNorm and one linear layer, `width` (64 in the paper) at the first layer."""
    layers: list[nn.Module] = []
    before = channels
    for factor, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            after = factor * width
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10))


@dataclass(frozen=True)
class Network:
    """A network, its data and how far it is compressed.

    Args:
        make: The network for a width; it comes trained if `train` is None.
        data: Training and test images with labels.
        budget: Of the search.
        width: The default.
        epochs: Of training it, with a peak learning rate; None if it comes trained.
    """

    make: Callable[[int], nn.Module]
    data: Callable[[], tuple[Data, Data]]
    budget: str
    width: int
    epochs: int | None = None
    learning_rate: float = 0.1
    optimizer: str = "sgd"


NETWORKS = {
    "resnet20": Network(lambda width: cifar.resnet20(), cifar10, "macs<=30%", 16),
    "vgg": Network(lambda width: vgg16(1, width), padded_fashion, "macs<=15%", 16, 12),
    "vgg-cifar": Network(lambda width: vgg16(3, width), cifar10, "macs<=15%", 24, 24),
    "vit": Network(lambda width: ViT(width), fashion, "macs<=50%", 96, 12, 2e-3, "adamw"),
}


class Images(torch.utils.data.Dataset[Data]):
    """Whole batches of images at once, channels_last: faster than one by one."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> Data:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> Data:
        return _last(self.x[indices]), self.y[indices]


class Bench:
    """One network with its data and its folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.network = NETWORKS[arguments.network]
        self.folder: Path = Path(arguments.folder) / (
            arguments.network + ("-held" * arguments.held)
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        seen, test = self.cached_data()
        if arguments.held:
            count = len(seen[1]) // 10
            test = (seen[0][:count], seen[1][:count])
            seen = (seen[0][count:], seen[1][count:])
        if arguments.images:
            seen = (seen[0][: arguments.images], seen[1][: arguments.images])
        self.test = (_last(test[0]), test[1])
        self.held = list(_last(seen[0][:CALIBRATION]).split(BATCH))
        # drop_last: BatchNorm wants whole batches.
        self.loader: Any = torch.utils.data.DataLoader(
            Images(*seen),
            batch_size=arguments.batch,
            shuffle=True,
            drop_last=True,
            collate_fn=_as_it_is,
        )

    def cached_data(self) -> tuple[Data, Data]:
        """Training and test images; decoding JPEGs once takes a minute."""
        path = self.folder / "data.pt"
        if not path.exists():
            found = self.network.data()
            with atomic_path(path) as temporary:
                torch.save(found, temporary)
        seen, test = torch.load(path, weights_only=True)
        return seen, test

    def scored(self, name: str, model: nn.Module, **more: Any) -> None:
        """Write down the accuracy of a finished variant."""
        right = unseen.correct(model.eval(), self.test).double().mean().item()
        result = {"accuracy": 100 * right, **more}
        write_text(self.folder / f"{name}.json", json.dumps(result) + "\n")
        print(f"{name}: {result}", flush=True)

    def label(self, name: str) -> str:
        """The name of a variant's folder and result."""
        recipe = self.arguments.recipe
        return f"{name}-{recipe}" if recipe and name not in ("dense", "start", "table") else name

    def done(self, name: str) -> bool:
        """Whether a variant has its result."""
        return (self.folder / f"{self.label(name)}.json").exists()

    def tuned(self, name: str, model: nn.Module, **settings: Any) -> rankopt.Training:
        """Fine-tune, or go on with it, in a folder of the variant's own."""
        started = time.process_time()
        # On a CPU the fused attention's backward pass takes most of a small ViT's step.
        with sdpa_kernel(SDPBackend.MATH):
            training = rankopt.finetune(
                model,
                self.loader,
                augment=pasted if self.arguments.paste else "auto",
                folder=self.folder / name,
                seed=self.arguments.seed,
                precision=self.arguments.precision,
                **settings,
            )
        print(f"{name}: {training}; {time.process_time() - started:.0f} s of CPU time in this run")
        return training

    # Variants

    def dense(self) -> None:
        """The trained network in ``dense.pt``."""
        torch.manual_seed(0)
        model = _channels_last(self.network.make(self.arguments.width or self.network.width))
        seconds = 0.0
        if self.network.epochs is not None:
            training = self.tuned(
                "dense",
                model,
                epochs=self.arguments.dense_epochs or self.network.epochs,
                learning_rate=self.network.learning_rate,
                optimizer=self.network.optimizer,
                weight_decay=5e-4 if self.network.optimizer == "sgd" else 0.02,
                warmup=0.15,
            )
            seconds = training.seconds
        with atomic_path(self.folder / "dense.pt") as temporary:
            torch.save(model.state_dict(), temporary)
        self.scored("dense", model, seconds=seconds)

    def trained(self) -> nn.Module:
        """The dense network, trained first if need be."""
        if not self.done("dense"):
            self.dense()
        model = _channels_last(self.network.make(self.arguments.width or self.network.width))
        model.load_state_dict(torch.load(self.folder / "dense.pt", weights_only=True))
        return model.eval()

    def start(self) -> None:
        """The compressed network in ``start.safetensors``."""
        dense = self.trained()
        example = self.held[0][:64]
        choice: Any = "search" if self.arguments.factors else False
        plan = rankopt.search(
            dense,
            self.arguments.budget or self.network.budget,
            example_inputs=example,
            calibration=self.held,
            methods=self.arguments.methods.split(",") if self.arguments.methods else None,
            asymmetric=choice,
            fisher=choice,
        )
        small = rankopt.apply(dense, plan, calibration=self.held)
        right = unseen.correct(small, self.test).double().mean().item()
        if self.arguments.recover:
            done = rankopt.recover(
                small, teacher=dense, calibration=self.held, seconds=self.arguments.recover
            )
            print(done)
        rankopt.save(small, self.folder / "start.safetensors")
        share = {axis: e["measured"] / e["before"] for axis, e in plan.totals.items()}  # type: ignore[operator]
        self.scored("start", small, applied=100 * right, **share)

    def variant(self, name: str) -> None:
        """Fine-tune the dense network (``control``) or the compressed one."""
        dense = self.trained()
        model = dense
        if name != "control":
            if not self.done("start"):
                self.start()
            model = rankopt.load(dense, self.folder / "start.safetensors")
        arguments = self.arguments
        plain = name in ("control", "full")
        settings: dict[str, Any] = {
            "freezing": self.freezing("none" if plain else name),
            "final_epochs": 0 if plain else arguments.final_epochs,
        }
        # Of the layers' own terms the control has none; logits suit both.
        outputs = 0 if name == "control" else arguments.outputs
        terms = Distillation(
            labels=arguments.labels, weights=0, outputs=outputs, logits=arguments.logits
        )
        if arguments.logits or outputs:
            settings |= {"teacher": self.trained(), "distillation": terms}
        label = self.label(name)
        training = self.tuned(
            label,
            model,
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            optimizer=arguments.optimizer,
            weight_decay=arguments.weight_decay,
            ema=arguments.ema,
            **settings,
        )
        self.scored(label, model, seconds=training.seconds, epochs=len(training.history))

    def freezing(self, name: str) -> Schedule:
        """The schedule of a name, with the fronts that were asked for."""
        schedule = FREEZING[name]()
        for front in self.arguments.front if name != "none" else ():
            schedule = schedule.front(*parse_front(front))
        return schedule

    def table(self) -> None:
        """Print the finished variants."""
        scored = "a tenth of the training images" if self.arguments.held else "test images"
        made = table(
            f"{self.arguments.network}, {self.network.budget}: accuracy on {len(self.test[1])} "
            f"{scored}",
            "variant", "accuracy", "against control", "epochs", "seconds", "of full's",
        )  # fmt: skip
        results = {
            name: json.loads((self.folder / f"{self.label(name)}.json").read_text())
            for name in VARIANTS
            if self.done(name)
        }
        control, full = results.get("control"), results.get("full")
        for name, found in results.items():
            apart = f"{found['accuracy'] - control['accuracy']:+.2f}" if control else "–"
            seconds = found.get("seconds")
            ratio = f"{seconds / full['seconds']:.2f}" if full and found.get("epochs") else "–"
            made.add_row(
                name,
                f"{found['accuracy']:.2f}",
                apart,
                str(found.get("epochs", "–")),
                f"{seconds:.0f}" if seconds else "–",
                ratio,
            )
        print(to_text(made))


def pasted(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved and mirrored; in every other batch with a square of another image (CutMix,
    arXiv 1905.04899): what a teacher says of them it did not learn by heart.
    """
    images: Tensor = shift_and_mirror(inputs, generator)
    chance, share, down, across = torch.rand(4, generator=generator).tolist()
    if chance < 0.5:
        return images
    height, width = (int(side * (1 - share) ** 0.5) for side in images.shape[2:])
    row = int(down * (images.shape[2] - height + 1))
    column = int(across * (images.shape[3] - width + 1))
    square = (..., slice(row, row + height), slice(column, column + width))
    others = torch.randperm(len(images), generator=generator)
    images[square] = images[others][square]
    return images


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _as_it_is(batch: Any) -> Any:
    return batch


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--folder", default="out/accuracy", help="checkpoints and results")
    parser.add_argument("--held", action="store_true", help="score held-out training images")
    parser.add_argument("--recipe", default="", help="a name that keeps recipes apart")
    parser.add_argument("--images", type=int, default=0, help="fewer training images, for a trial")
    parser.add_argument("--width", type=int, default=0, help="of vgg and vit; 0 for the default")
    parser.add_argument("--dense-epochs", type=int, default=0, help="of dense; 0: the network's")
    parser.add_argument("--budget", default="")
    parser.add_argument("--methods", default="", help="decompositions, comma-separated")
    parser.add_argument("--factors", action="store_true", help="find out how to make factors")
    parser.add_argument("--recover", type=float, default=60.0, help="seconds; 0 for none")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="orders batches, moves images")
    parser.add_argument("--batch", type=int, default=BATCH, help="images per training step")
    parser.add_argument("--final-epochs", type=int, default=1, help="everything trains in them")
    parser.add_argument(
        "--front", action="append", default=[], metavar="MODULE:START[:END]",
        help="of fixed and sequential: epochs in which nothing up to this module trains",
    )  # fmt: skip
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--ema", type=float, default=None)
    parser.add_argument("--labels", type=float, default=0.5, help="weight of the labels' loss")
    parser.add_argument("--logits", type=float, default=0.5, help="weight of the teacher's")
    parser.add_argument("--outputs", type=float, default=0, help="weight of the layers' outputs")
    parser.add_argument("--paste", action="store_true", help="CutMix; with --labels 0")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    arguments = parser.parse_intermixed_args()
    if arguments.paste and arguments.labels:
        parser.error("--paste has no labels of two images: add --labels 0 --logits 1")
    unknown = set(arguments.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    torch.manual_seed(0)
    bench = Bench(arguments)
    for name in arguments.variants or [name for name in VARIANTS if name != "fixed"]:
        if bench.done(name):
            continue
        if name in ("dense", "start", "table"):
            getattr(bench, name)()
        else:
            bench.variant(name)


if __name__ == "__main__":
    main()
