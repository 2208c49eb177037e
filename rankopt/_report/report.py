"""report(): what was done to a model, as a page for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rankopt._report.page import page
from rankopt._report.sources import collect
from rankopt._utils.files import write_text
from rankopt.errors import RankoptError

__all__ = ["report"]


def report(source: Any, path: str | os.PathLike[str]) -> None:
    """Draw a plan, a training run or a whole compression as one HTML page.

    The page loads nothing: style and curves are inside, and it follows the
    reader's light or dark setting. It is written atomically.

    Args:
        source: A `RankPlan`, `Comparison`, `Training` or `Compression`; or a path of a plan
            (``.json``), a checkpoint (``.safetensors``), a training record (``.jsonl``), or the
            folder given to `rankopt.finetune` or `rankopt.compress`; or several in a list.
        path: Ends in ``.html``.

    Raises:
        RankoptError: A source cannot be read or shown, or `path` cannot be written.
        PlanError: A plan's file is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> plan = rankopt.search(nn.Sequential(nn.Linear(64, 64)), "params<=50%")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rankopt.report(plan, f"{folder}/plan.html")
        ...     Path(folder, "plan.html").read_text()[:15]
        '<!DOCTYPE html>'
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise RankoptError(f"cannot write {path}: a report is an HTML page, so end it in .html")
    write_text(path, page(collect(source)))
