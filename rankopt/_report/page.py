"""The parts of a report as HTML: figures, stages, layers, curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final, TypeGuard

from rankopt._report.charts import Line, line_chart
from rankopt._report.sources import Contents, TrainingRun
from rankopt._report.style import STYLE
from rankopt._utils.tables import count, counted, milliseconds
from rankopt.plan import Decision, RankPlan

__all__ = ["page"]

AXES: Final = {"params": "parameters", "macs": "MACs", "memory": "memory", "latency": "latency"}


def page(contents: Contents) -> str:
    """A whole HTML document that loads nothing."""
    title = _title(contents)
    sections = [_figures(contents), _stages(contents.stages)]
    sections += [_run(run) for run in contents.runs]
    if contents.plan is not None:
        sections += [_layers(contents.plan), _provenance(contents.plan)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{escape(title)}</h1>{_subtitle(contents)}\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _title(contents: Contents) -> str:
    if contents.plan is None:
        return f"Training report: {contents.runs[0].name}" if contents.runs else "Comparison report"
    return f"Compression report: {contents.plan.model.get('class', 'model')}"


def _subtitle(contents: Contents) -> str:
    plan = contents.plan
    if plan is None:
        return ""
    parts = [f"Strategy <b>{escape(str(plan.strategy.get('name', 'by hand')))}</b>"]
    if plan.budget is not None:
        parts.append(f"budget {escape(plan.budget.explain())}")
    kept = len(plan.decisions) - len(plan.changes)
    parts.append(f"{counted(len(plan.changes), 'layer')} decomposed, {kept} kept")
    parts.append(f"search time {_duration(plan.seconds)}")
    return f'<p class="lead">{" · ".join(parts)}</p>'


# Headline figures


def _figures(contents: Contents) -> str:
    tiles: list[str] = []
    verdict = ""
    if contents.comparison is not None:
        tiles = _compared(contents.comparison)
        verdict = f'<p class="verdict">{escape(str(contents.comparison["verdict"]))}</p>'
    elif contents.plan is not None:
        for axis, entry in contents.plan.totals.items():
            found = entry["measured"] if entry["measured"] is not None else entry["predicted"]
            before = entry["before"]
            if before and found is not None:
                how = "measured" if entry["measured"] is not None else "predicted"
                tiles.append(_ratio(axis, before, found, how if axis == "latency" else ""))
        metrics = [s["metric"] for s in contents.stages if _finite(s["metric"])]
        if metrics:
            tiles.append(_tile("Metric so far", f"{metrics[-1]:.4g}", "not finished"))
    if not tiles:
        tiles = [tile for run in contents.runs for tile in _trained(run)]
    return f'<section class="tiles">{"".join(tiles)}</section>{verdict}' if tiles else ""


def _compared(values: Mapping[str, Any]) -> list[str]:
    tiles = []
    metric = values["metric"]
    if metric is not None:
        before, after = metric["before"], metric["after"]
        change = f", change {after - before:+.3g}" if _finite(before) and _finite(after) else ""
        tiles.append(_tile("Metric", _metric(after), f"dense {_metric(before)}{change}"))
    error, same = values.get("output_error"), values.get("agreement")
    if error is not None or same is not None:
        note = "" if same is None else f", {100 * same:.1f}% of predicted classes unchanged"
        text = "not finite" if error is None else f"{error:.2g}"
        tiles.append(_tile("Output error", text, f"relative to dense{note}"))
    for axis in ("params", "macs", "memory"):
        if values[axis] is not None and values[axis]["before"]:
            tiles.append(_ratio(axis, values[axis]["before"], values[axis]["after"]))
    ratio = values["latency_ratio"]
    if ratio is not None:
        before, after = (values[f"latency_{when}_ms"]["median"] for when in ("before", "after"))
        between = f"95% interval {100 * ratio['low']:.1f} to {100 * ratio['high']:.1f}%"
        tiles.append(
            _tile(
                _share("latency"),
                f"{100 * ratio['median']:.1f}%",
                f"{milliseconds(before)} → {milliseconds(after)}; {between}",
            )
        )
    return tiles


def _ratio(axis: str, before: float, after: float, how: str = "") -> str:
    shown = milliseconds if axis == "latency" else count
    unit = "B" if axis == "memory" else ""
    text = f"{shown(before)}{unit} → {shown(after)}{unit}" + (f", {how}" if how else "")
    return _tile(_share(axis), f"{100 * after / before:.1f}%", text)


def _share(axis: str) -> str:
    """What a percentage is of.

    Example:
        >>> _share("params")
        'Parameters, % of dense'
    """
    name = AXES.get(axis, axis)
    return f"{name[:1].upper()}{name[1:]}, % of dense"


def _trained(run: TrainingRun) -> list[str]:
    last = run.epochs[-1] if run.epochs else None
    if last is None:
        return []
    tiles = [_tile("Training loss", f"{last['loss']:.4g}", f"after {len(run.epochs)} epochs")]
    if last["accuracy"] is not None:
        tiles.append(_tile("Training accuracy", f"{last['accuracy']:.2f}%", "last epoch"))
    metrics = [(e["metric"], e["epoch"]) for e in run.epochs if _finite(e["metric"])]
    if metrics:
        best, epoch = max(metrics, key=lambda pair: pair[0])
        tiles.append(_tile("Metric", f"{best:.4g}", f"best, epoch {epoch + 1}"))
    seconds = sum(epoch["seconds"] for epoch in run.epochs)
    tiles.append(_tile("Training time", _duration(seconds), f"{_mean_speed(run):.0f} samples/s"))
    return tiles


def _mean_speed(run: TrainingRun) -> float:
    samples = sum(epoch["samples_per_second"] * epoch["seconds"] for epoch in run.epochs)
    return float(samples / max(sum(epoch["seconds"] for epoch in run.epochs), 1e-9))


def _finite(metric: float | None) -> TypeGuard[float]:
    return metric is not None and math.isfinite(metric)


def _metric(value: float | None) -> str:
    """Files hold null for what is not finite."""
    return f"{value:.4g}" if _finite(value) else "–"


def _tile(name: str, value: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def _duration(seconds: float) -> str:
    """Seconds in the unit a person would use.

    Example:
        >>> [_duration(s) for s in (4.25, 312, 7260)]
        ['4.2 s', '5 min 12 s', '2 h 1 min']
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# Stages and curves


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    rows = [
        (
            escape(str(stage["name"])),
            _duration(stage["seconds"]),
            count(stage["params"]),
            _metric(stage["metric"]),
            escape(str(stage["note"])),
        )
        for stage in stages
    ]
    columns = ("Stage", "Time", "Parameters", "Metric", "Result")
    return "<section><h2>Stages</h2>" + _table(columns, rows, words=(0, 4)) + "</section>"


def _run(run: TrainingRun) -> str:
    charts = [
        line_chart(title, [_series(run, key, title) for key, title in lines], x_label="epoch")
        for title, lines in (
            ("Loss", [("loss", "loss")]),
            ("Training accuracy, %", [("accuracy", "accuracy")]),
            ("Metric", [("metric", "metric")]),
            ("Throughput, samples/s", [("samples_per_second", "speed")]),
            ("Learning rate", [("learning_rate", "rate")]),
        )
    ]
    if not any(charts):
        return ""
    wanted = ("optimizer", "schedule", "freezing", "precision", "processes", "seed")
    settings = " · ".join(
        f"{key} {escape(str(run.settings[key]))}" for key in wanted if run.settings.get(key)
    )
    note = f'<p class="lead">{settings}</p>' if settings else ""
    return (
        f"<section><h2>{escape(run.name[:1].upper() + run.name[1:])}</h2>{note}"
        f'<div class="charts">{"".join(charts)}</div></section>'
    )


def _series(run: TrainingRun, key: str, label: str) -> Line:
    shown = [epoch for epoch in run.epochs if epoch[key] is not None]
    notes = [
        f"epoch {epoch['epoch'] + 1}: {epoch[key]:.5g}"
        + (f", {epoch['frozen']} parameters frozen" if epoch["frozen"] else "")
        for epoch in shown
    ]
    return Line(label, [(epoch["epoch"] + 1, epoch[key]) for epoch in shown], notes)


# Layers


def _layers(plan: RankPlan) -> str:
    axis = "macs" if any("macs" in decision.cost for decision in plan) else "params"
    costs = [decision.cost.get(axis, (0, 0)) for decision in plan]
    largest = max((max(pair) for pair in costs), default=0) or 1
    counted = plan.totals.get(axis, {}).get("before")
    total = counted or sum(before for before, _ in costs) or 1
    rows = [_layer(decision, axis, largest, total) for decision in plan]
    name = AXES[axis]
    columns = ("Layer", "Weight", "Method", "Ranks", _share(axis), "Error", "Reason")
    return (
        f'<section><h2>Layers</h2><p class="lead">Bars: {name} of the dense layer (pale) and of '
        "its replacement (solid), all on one scale. Error: relative error of the weight or, with "
        "calibration, of the layer's output.</p>"
        + _table(columns, rows, words=(0, 2, 4, 6))
        + "</section>"
    )


def _layer(decision: Decision, axis: str, largest: float, total: float) -> tuple[str, ...]:
    before, after = decision.cost.get(axis, (0, 0))
    bar = "–"
    if before:
        now = (
            f"{100 * after / before:.0f}% of {count(before)}" if after != before else count(before)
        )
        bar = (
            f'<div class="bar" title="{100 * before / total:.1f}% of the model\'s '
            f'{AXES[axis]}"><i style="width:{100 * before / largest:.2f}%"></i>'
            f'<b style="width:{100 * after / largest:.2f}%"></b></div>'
            f'<span class="small">{now}</span>'
        )
    kind = "keep" if decision.keeps else "changed"
    return (
        "<br>".join(f"<code>{escape(name) or '(root)'}</code>" for name in decision.targets),
        "×".join(map(str, decision.shapes[0])),
        f'<span class="chip {kind}">{escape(decision.method)}</span>',
        " × ".join(map(str, decision.ranks)) or "–",
        bar,
        "–" if decision.error is None or decision.keeps else f"{decision.error:.3f}",
        f'<span class="small">{escape(decision.reason)}</span>',
    )


def _provenance(plan: RankPlan) -> str:
    rows = [
        (escape(key), escape(str(value)))
        for group in (plan.strategy, plan.model, plan.environment)
        for key, value in group.items()
    ]
    return (
        "<details><summary>Strategy, model and environment of the plan</summary>"
        + _table(("Field", "Value"), rows, words=(0, 1))
        + "</details>"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int]) -> str:
    """A table of cells that are HTML already; those not in `words` are numbers."""
    kinds = ["" if index in words else ' class="num"' for index in range(len(columns))]
    head = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )
