"""How a run is shown: tables, contact sheet, HTML page, dashboards. `common.run` reads and writes the files."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

COLOURS = "#3b82f6 #f97316 #22a55b #e5484d #8b5cf6 #14a3a8 #d4a017 #d6409f #8d6e63 #78828c".split()
PER_BAND, MOST_COLUMNS = 12, 96


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under each other, a rule under the header."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def tracker(
    kind: str, script: str, folder: Path, args: dict[str, Any]
) -> Callable[[int, dict[str, float]], None] | None:
    """A function that passes (step, scalars) on to tensorboard, wandb or trackio; ImportError if it is missing."""
    # A continued run goes on in the same curves; a folder made anew, even under the old name, begins new ones.
    made = f"{folder.resolve()} {(folder / 'args.json').stat().st_mtime_ns}"
    run_id = hashlib.sha256(made.encode()).hexdigest()[:12]
    name = f"{script}-{folder.name}-{run_id[:4]}"
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        events = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int, scalars: dict[str, float]) -> None:
            for key, value in scalars.items():
                events.add_scalar(key, value, step)
            events.flush()  # a killed process would lose what it had buffered

        return to_tensorboard
    if kind == "wandb":
        import wandb

        there = wandb.init(project="cleansynth", name=name, id=run_id, resume="allow", config=args, dir=str(folder))
        there.define_metric("*", step_metric="step")  # wandb's own step may never fall, but each stage begins at 1
        return lambda step, scalars: there.log({"step": step, **scalars})
    if kind == "trackio":
        import trackio

        board = trackio.init(project="cleansynth", name=name, resume="allow", config=args)
        return lambda step, scalars: board.log(scalars, step=step)
    assert kind == "none", f"unknown tracker {kind}"
    return None


def contact_sheet(rows: Sequence[Sequence[Any]], row_names: Sequence[str], col_names: Sequence[str] | None, size: int):
    """PIL images (or None) in rows -> one PIL image with names at the left and above; columns break into bands."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    # DejaVu, because Pillow's own font knows Latin letters only.
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)
    n = max(map(len, rows), default=0)
    shown = [i * n // min(n, MOST_COLUMNS) for i in range(min(n, MOST_COLUMNS))]
    bands = [shown[i : i + PER_BAND] for i in range(0, len(shown), PER_BAND)]
    gap, line = 4, 16

    def fit(text: str, width: float) -> str:
        text = " ".join(str(text).split())
        if font.getlength(text) <= width:
            return text
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        return text.rstrip() + "…"

    left = 2 * gap + math.ceil(max((font.getlength(fit(name, 220)) for name in row_names), default=0))
    top = gap + (line if col_names else 0)
    width = left + (size + gap) * min(n, PER_BAND) + gap
    height = (top + (size + gap) * len(rows) + gap) * len(bands) + gap
    sheet = Image.new("RGB", (max(1, width), max(1, height)), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for band in bands:
        for k, column in enumerate(band if col_names else []):
            text = fit(col_names[column], size)
            x = left + k * (size + gap) + (size - font.getlength(text)) / 2
            draw.text((x, y), text, fill="#333333", font=font)
        y += top
        for row, name in zip(rows, row_names, strict=True):
            draw.text((gap, y + size / 2), fit(name, 220), fill="#333333", font=font, anchor="lm")
            for k, column in enumerate(band):
                if column < len(row) and row[column] is not None:
                    cell = _into_square(row[column], size)
                    at = ((size - cell.width) // 2, (size - cell.height) // 2)
                    sheet.paste(cell, (left + k * (size + gap) + at[0], y + at[1]))
            y += size + gap
        y += gap
    return sheet


def _into_square(image: Any, size: int) -> Any:
    """Scale to fit size x size, keeping the shape; small images keep their pixels visible."""
    from PIL import Image

    image = image.convert("RGB")
    scale = size / max(image.size)
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(target, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


STYLE = """
:root { --ground: #f6f7f9; --card: #ffffff; --ink: #1c2430; --soft: #66707d; --line: #dfe3e8; --accent: #2563eb }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12161c; --card: #1b212a; --ink: #e6eaf0; --soft: #98a3b1; --line: #313a46; --accent: #6ea0ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 60px }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px }
h2 { font-size: 17px; margin: 0 0 12px } .note + h2 { margin-top: 22px }
.summary { font-size: 17px; color: var(--soft); margin: 0 0 24px; max-width: 80ch }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin: 0 0 18px; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
table.plain { width: 100% }
.plain th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line) }
.plain th, .plain td { padding: 6px 18px 6px 0 } .plain td { border-bottom: 1px solid var(--line) }
.plain tr:last-child td { border-bottom: 0 } .plain td:first-child { font-weight: 600 }
img.sheet { max-width: 100%; height: auto; border-radius: 8px; background: #fff; display: block }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 18px }
figure { margin: 0; min-width: 0 } figcaption { font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px }
svg .grid { stroke: var(--line) } svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 12px; color: var(--soft) }
.legend i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: 3px }
.matrix td { min-width: 34px; height: 30px; text-align: center; font-size: 12px; border: 1px solid var(--card) }
.matrix th { font-weight: 500; font-size: 12px; color: var(--soft); max-width: 180px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; text-align: right; padding: 0 8px }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 6px 0;
  max-height: 140px }
.heat { width: min(100%, 640px); image-rendering: pixelated; border: 1px solid var(--line); display: block }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 14px; align-items: center }
.bars b { font-weight: 500 } .bars span { color: var(--soft); font-variant-numeric: tabular-nums }
.bars div { height: 14px; border-radius: 4px; background: var(--accent); min-width: 2px }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace }
.note { color: var(--soft); font-size: 13px; margin: 10px 0 0 } summary { cursor: pointer; font-weight: 600 }
details pre { margin-top: 12px }
"""


def page(
    title: str,
    summary: str,
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
    pictures: dict[str, bytes],
    curves: dict[str, dict[int, float | None]],
    confusion: Sequence[Sequence[float]] | None,
    class_names: Sequence[str],
    seconds: dict[str, float],
    info: dict[str, Any],
) -> str:
    """One self-contained HTML page, light and dark. pictures: {caption: PNG}; curves: {name: {step: value}}; confusion:
    counts [C, C], row = true class; info: the content of args.json. All text is escaped."""
    parts = [_section(caption, _table(header, rows)) for caption, (header, rows) in tables.items()]
    for caption, png in pictures.items():
        parts.append(_section(caption, f'<img class="sheet" alt="{escape(caption)}" src="{_data_uri(png)}">'))
    if curves:
        parts.append(_section("Curves", _charts(curves)))
    if confusion:
        parts.append(_section("Confusion matrix", _confusion(confusion, class_names)))
    if seconds:
        parts.append(_section("Time", _bars(seconds)))
    versions = ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())
    commit = f"commit {info.get('git_commit')}{' with local changes' if info.get('git_dirty') else ''}"
    place = f"{info.get('world', 1)} process(es) on {info.get('device', 'cpu')}"
    note = f'<p class="note">{escape(f"{commit}; {place}; {versions}")}</p>'
    parts.append(_section("Command", f"<pre>{escape(str(info.get('command', '')))}</pre>{note}"))
    flags = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in info.get("args", {}).items())
    parts.append(f"<section><details><summary>All flags</summary><pre>{escape(flags)}</pre></details></section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f'<body><main><h1>{escape(title)}</h1><p class="summary">{escape(summary)}</p>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _charts(curves: dict[str, dict[int, float | None]]) -> str:
    """One chart for each first and last component of the names; what stands between names the line."""
    groups: dict[str, dict[str, dict[int, float | None]]] = {}
    for name, points in curves.items():
        first, *middle = name.split("/")
        last = middle.pop() if middle else ""
        groups.setdefault(f"{first}: {last}" if last else first, {})["/".join(middle)] = points
    return '<div class="charts">' + "".join(_chart(name, lines) for name, lines in groups.items()) + "</div>"


def _chart(name: str, lines: dict[str, dict[int, float | None]]) -> str:
    width, height, left, bottom, top, right = 360, 210, 48, 24, 8, 10
    known = {key: [(x, y) for x, y in points.items() if y is not None] for key, points in lines.items()}
    xs = [x for points in known.values() for x, _ in points] or [0]
    ys = [y for points in known.values() for _, y in points] or [0]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))

    def px(x: float) -> float:
        return left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y0) / ((y1 - y0) or 1) * (height - bottom - top)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        if x0 <= x <= x1:
            parts.append(f'<text x="{px(x):.1f}" y="{height - 7}" text-anchor="middle">{x:g}</text>')
    many = len(known) > len(COLOURS)
    for i, (key, points) in enumerate(known.items()):
        stroke = COLOURS[0] if many else COLOURS[i]
        step = max(1, len(points) // 400)  # more points than pixels only make the page heavy
        points = points[::step] + (points[-1:] if (len(points) - 1) % step else [])
        hint = f"<title>{escape(key or name)}</title>"
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{stroke}">{hint}</circle>')
        else:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
            faint = ' stroke-opacity="0.35"' if many else ""
            parts.append(f'<polyline stroke="{stroke}"{faint} points="{path}">{hint}</polyline>')
    if many:
        legend = f"<span>{len(known)} lines, {escape(next(iter(known)))} … {escape(next(reversed(known)))}</span>"
    else:
        named = [(COLOURS[i], key) for i, key in enumerate(known) if key]
        legend = "".join(f'<span><i style="background:{colour}"></i>{escape(key)}</span>' for colour, key in named)
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
    return f'<figure><figcaption>{escape(name)}</figcaption>{drawing}<div class="legend">{legend}</div></figure>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / 4 * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, max(last, first) + 1)]


def _confusion(counts: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """Share of each true class (row) by predicted class (column); numbers up to 20 classes, a picture above."""
    n = len(counts)
    names = list(names) or [str(i) for i in range(n)]
    shares = [[value / (sum(row) or 1) for value in row] for row in counts]
    note = (
        '<p class="note">Rows: true class. Columns: predicted class. The darker, the larger the share of the row.</p>'
    )
    if n > 20:
        return f'<img class="heat" alt="confusion matrix" src="{_heat_map(shares)}">{note}{_worst(counts, names)}'
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for name, row, share_row in zip(names, counts, shares, strict=True):
        cells = ""
        for value, share in zip(row, share_row, strict=True):
            ink = "#fff" if share > 0.5 else "inherit"
            cells += f'<td style="background:rgba(37,99,235,{share:.3f});color:{ink}">{value:g}</td>'
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>{note}'


def _heat_map(shares: Sequence[Sequence[float]]) -> str:
    """Blue, the more opaque the larger the share: reads on light and on dark."""
    from PIL import Image

    n = len(shares)
    picture = Image.new("RGBA", (n, n))
    # The square root lifts rare confusions out of the background.
    picture.putdata([(37, 99, 235, round(255 * math.sqrt(share))) for row in shares for share in row])
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return _data_uri(data.getvalue())


def _worst(counts: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    pairs = [(counts[i][j], names[i], names[j]) for i in range(len(names)) for j in range(len(names)) if i != j]
    worst = sorted((pair for pair in pairs if pair[0]), key=lambda pair: -pair[0])[:10]
    rows = [[true, predicted, f"{count:g}"] for count, true, predicted in worst]
    return "<h2>Most frequent errors</h2>" + _table(["true class", "taken for", "times"], rows) if rows else ""


def _bars(seconds: dict[str, float]) -> str:
    longest = max(seconds.values()) or 1
    rows = [
        f'<b>{escape(stage)}</b><div style="width:{100 * value / longest:.1f}%"></div><span>{_duration(value)}</span>'
        for stage, value in [*seconds.items()]
    ]
    total = f'<p class="note">Together {_duration(sum(seconds.values()))}, interrupted attempts included.</p>'
    return f'<div class="bars">{"".join(rows)}</div>{total}'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
