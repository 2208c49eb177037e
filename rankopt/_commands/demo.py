"""The demo: a residual network trained on real handwritten digits, then compressed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankopt
from rankopt._model import measure
from rankopt._model.surgery import clone
from rankopt._utils.tables import count, table
from rankopt.errors import BudgetInfeasible, MissingDependency, RankoptError

__all__ = ["DigitsNet", "load_digits", "run", "train"]

BUDGET: Final = "macs<=50%"
EPOCHS: Final = 12
BATCH: Final = 64
# Training images that a strategy may measure the metric on.
SEEN = 512
WIDTH: Final = 32
TEST_SHARE: Final = 0.3
SEED: Final = 0


class DigitsNet(nn.Module):
    """A pre-activation residual network for 16x16 grey images and 10 classes.

    Args:
        width: Channels of the first stage; each of three stages doubles them.
        blocks: Residual blocks per stage.
    """

    def __init__(self, width: int = WIDTH, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                layers.append(_Block(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 10] of images [batch, 1, 16, 16]."""
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual update; halves height and width where the block strides."""
        active = F.relu(self.norm1(x))
        hidden = self.conv2(F.relu(self.norm2(self.conv1(active))))
        skipped = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        out: Tensor = hidden + skipped
        return out


def load_digits(seed: int = SEED) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 real digits as (train x, train y, test x, test y).

    Images are [n, 1, 16, 16], enlarged from 8x8; the split is stratified.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingDependency(
            "the demo needs scikit-learn; pip install 'rankopt[demo]'"
        ) from error
    data = load()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate((images - 0.3) / 0.4, size=16, mode="bilinear")
    labels = torch.tensor(data.target)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_SHARE, stratify=data.target, random_state=seed
    )
    return images[train], labels[train], images[test], labels[test]


def train(
    model: nn.Module, x: Tensor, y: Tensor, *, epochs: int = EPOCHS, seed: int = SEED
) -> None:
    """Train with Adam, a one-cycle schedule and random shifts."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(x) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(model(x[batch].roll((down, right), dims=(2, 3))), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, in percent."""
    with measure.evaluation(model), torch.no_grad():
        right = sum(
            int((model(a).argmax(dim=1) == b).sum().item())
            for a, b in zip(x.split(256), y.split(256), strict=True)
        )
    return 100 * right / len(y)


def run(folder: str | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Train, search with every strategy, apply, measure, save, reload.

    Args:
        folder: Where plan and weights are kept; a temporary folder if None.
        quiet: Print nothing.

    Returns:
        The table as plain data.

    Raises:
        RankoptError: The reloaded model does not give the same logits.
    """
    say: Callable[[Any], None] = (lambda _: None) if quiet else _console_print
    torch.manual_seed(SEED)
    x, y, test_x, test_y = load_digits()
    say(f"training a small residual network on {len(x)} real digits …")
    model = DigitsNet()
    train(model, x, y)
    dense = accuracy(model, test_x, test_y)
    say(f"dense: {dense:.2f}% of {len(test_y)} held-out digits\n")
    rows = []
    for name in rankopt.strategies.names():
        # Strategies that ask for the metric see training images; the held-out ones judge all.
        metric = partial(accuracy, x=x[:SEEN], y=y[:SEEN]) if _measures(name) else None
        rows.append(_row(name, model, test_x, test_y, dense, metric))
    say(_table(rows, dense))
    done = [row for row in rows if "model" in row]
    best = max(done, key=lambda row: row["accuracy"])
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(folder or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        reloaded = _save_and_reload(best, kept, test_x)
        say(
            f"best: {best['strategy']}; saved, reloaded into a fresh DigitsNet: logits "
            f"identical on {len(test_x)} digits, accuracy {accuracy(reloaded, test_x, test_y):.2f}%"
        )
        if folder is not None:
            say(f"plan and weights are in {kept}")
    for row in rows:
        row.pop("model", None)
    return {"dense_accuracy": dense, "budget": BUDGET, "best": best["strategy"], "rows": rows}


def _measures(name: str) -> bool:
    """Whether a strategy needs the task's metric."""
    try:
        return "evaluate" in rankopt.strategies.get(name).tags.needs
    except RankoptError:  # a plug-in that fails to import is reported in its row
        return False


def _row(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    dense: float,
    metric: Callable[[nn.Module], float] | None,
) -> dict[str, Any]:
    try:
        plan = rankopt.search(
            model, BUDGET, strategy=name, example_inputs=x[:BATCH], evaluate=metric
        )
    except (BudgetInfeasible, RankoptError) as error:
        return {"strategy": name, "failure": str(error)}
    small = rankopt.apply(model, plan)
    result = rankopt.compare(model, small, example_inputs=x[:BATCH])
    assert result.macs is not None
    assert result.latency_ratio is not None
    return {
        "strategy": name,
        "search_seconds": plan.seconds,
        "accuracy_before": dense,
        "accuracy": accuracy(small, x, y),
        "params_ratio": result.params.ratio,
        "macs_ratio": result.macs.ratio,
        "params": result.params.after,
        "macs": result.macs.after,
        "latency_ratio": result.latency_ratio.median,
        "latency_low": result.latency_ratio.low,
        "latency_high": result.latency_ratio.high,
        "verdict": result.verdict,
        "model": small,
    }


def _table(rows: list[dict[str, Any]], dense: float) -> Any:
    faster = [row for row in rows if row.get("latency_high", 2) < 1]
    caption = (
        f"latency: median paired ratio to dense at batch {BATCH} with its 95% interval, "
        "below 100% is faster"
    )
    if not faster:
        caption += "\nnothing got faster than dense here: halving MACs is not halving time"
    made = table(
        f"{BUDGET}, digits, no fine-tuning",
        "strategy", "accuracy", "was", "params", "macs", "latency", "search",
        caption=caption,
    )  # fmt: skip
    for row in rows:
        if "failure" in row:
            made.add_row(row["strategy"], f"no plan: {row['failure']}")
            continue
        made.add_row(
            row["strategy"],
            f"{row['accuracy']:.2f}%",
            f"{dense:.2f}%",
            f"{count(row['params'])} ({100 * row['params_ratio']:.1f}%)",
            f"{count(row['macs'])} ({100 * row['macs_ratio']:.1f}%)",
            f"{100 * row['latency_ratio']:.0f}% "
            f"[{100 * row['latency_low']:.0f}, {100 * row['latency_high']:.0f}]",
            f"{row['search_seconds']:.2f} s",
        )
    return made


def _save_and_reload(best: dict[str, Any], folder: Path, x: Tensor) -> nn.Module:
    path = folder / "digits.safetensors"
    rankopt.save(best["model"], path)
    rankopt.load_plan(path).save(folder / "digits-plan.json")
    reloaded = rankopt.load(DigitsNet(), path).eval()
    with torch.no_grad():
        same = torch.equal(clone(best["model"]).eval()(x), reloaded(x))
    if not same:
        raise RankoptError("the reloaded model gives other logits than the saved one")
    return reloaded


def _console_print(item: Any) -> None:
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 110
    console.print(item, highlight=False)
