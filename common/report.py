"""How a run is shown: tables, and report.html, one page that holds all it needs."""

import base64
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import metrics
from common.files import plain, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from common.run import Run

Table = tuple[Sequence[str], Sequence[Sequence[Any]]] | tuple[Sequence[str], Sequence[Sequence[Any]], str]
COLOURS = "#2563eb #ea580c #16a34a #dc2626 #7c3aed #0891b2 #a16207 #db2777 #57534e #111827".split()
DASHES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4))]
MARKERS = ["", "o", "s", "^", "D", "v", "x"]


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (n - 1); of one value 0."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> str:
    """A cell of a table: "93.1 ± 0.4"; of one value only itself, of none "not run"."""
    if not len(values):
        return "not run"
    mean, std = mean_std(values)
    return f"{mean:.1f} ± {std:.1f}" if len(values) > 1 else f"{mean:.1f}"


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """What results.json says of a row: mean, standard deviation, and the value of each seed."""
    mean, std = mean_std(values)
    return {"mean": mean, "std": std, "per_seed": list(values)}


def means(found: Sequence[dict[str, Any]], *keys: str) -> dict[str, float]:
    """{key: mean over the runs that recorded it}; a key of none is left out. found: metrics.json of each run"""
    recorded = {key: [metrics[key] for metrics in found if key in metrics] for key in keys}
    return {key: mean_std(values)[0] for key, values in recorded.items() if values}


def per_class(predicted: Any, labels: Any, class_names: Sequence[str]) -> dict[str, float]:
    """{class: percent of its images that were taken for it}. predicted, labels: tensors of classes [N]"""
    right = (predicted == labels).float()
    return {name: 100 * right[labels == c].mean().item() for c, name in enumerate(class_names)}


def compared(metrics: dict[str, dict[str, Any]], claims: dict[str, Sequence[str]]) -> list[list[str]]:
    """Rows [claim, difference, verdict] of {claim: (better row, worse row)}. metrics: over_seeds of each row there is.

    shows: the difference of the means exceeds twice its standard error; the reverse; or within noise, as of one seed.
    """
    table = []
    for claim, pair in claims.items():
        a, b = (metrics.get(row) for row in pair)
        if not a or not b or a is b:
            table.append([claim, "", "not run"])
            continue
        n, gap = min(len(a["per_seed"]), len(b["per_seed"])), a["mean"] - b["mean"]
        # Standard error of the difference of two means. Less than is printed is nothing, however equal the seeds are.
        error = math.sqrt(sum(row["std"] ** 2 / len(row["per_seed"]) for row in (a, b)))
        noise = n < 2 or abs(gap) <= max(2 * error, 0.05)
        verdict = "within noise" if noise else "shows" if gap > 0 else "the reverse"
        table.append([claim, f"{gap:+.1f}" + (f" ± {error:.1f}" if n > 1 else ""), verdict])
    return table


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under each other, a rule under the header."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, call it on rank 0."""
    print("\n" + format_table(header, rows) + "\n", flush=True)


def compare_saved(run: "Run", accuracy: float, trained: float, n: int) -> None:
    """A note of the run if the classifier in its folder scores otherwise (percent of n images) than it did in training.

    Rounding (bf16, merged weights) flips an image or two: half a point, or three images, are not worth a word.
    """
    if abs(accuracy - trained) > max(0.5, 300 / n):
        run.notes.append(f"classifier/ scores {accuracy:.2f} after loading, {trained:.2f} in its training")


def conclude(
    run: "Run",
    title: str,
    summary: str,
    tables: dict[str, Table],
    labels: Any,
    predicted: Any,
    class_names: Sequence[str],
    pictures: dict[str, str] | None = None,
) -> None:
    """The last lines of a run: report.html, then its tables and notes on the terminal. Call it on rank 0.

    labels, predicted: classes [N] of the test split and of the saved classifier, for the confusion matrix. The rest as
    in `report`.
    """
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(labels, predicted, labels=range(len(class_names)))
    report(run, title, summary, tables, pictures, counts.tolist(), class_names)
    for header, rows, *_ in tables.values():
        print_table(header, rows)
    for note in run.notes:
        print(f"note: {note}")
    print(f"pictures: {run.path('samples.png')}   report: {run.path('report.html')}", flush=True)


# ---------------------------------------------------------------------------------------
# The page

STYLE = """
:root { --ground: #f6f7f9; --card: #ffffff; --ink: #1c2430; --soft: #66707d; --line: #dfe3e8 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12161c; --card: #1b212a; --ink: #e6eaf0; --soft: #98a3b1; --line: #313a46 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 60px }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px } h2 { font-size: 17px; margin: 0 0 12px }
.summary { font-size: 17px; color: var(--soft); margin: 0 0 24px; max-width: 80ch }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin: 0 0 18px; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th { text-align: left; color: var(--soft); border-bottom: 2px solid var(--line) }
th, td { padding: 6px 18px 6px 0 } td { border-bottom: 1px solid var(--line) }
tr:last-child td { border-bottom: 0 } td:first-child { font-weight: 600 }
img { max-width: 100%; height: auto; border-radius: 8px; background: #fff; display: block }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 18px; align-items: start }
.charts img { width: 100% }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Consolas, monospace }
.note { color: var(--soft); font-size: 13px; margin: 10px 0 0 } details pre { margin-top: 12px }
summary { cursor: pointer; font-weight: 600 }
"""


def report(
    run: "Run",
    title: str,
    summary: str,
    tables: dict[str, Table],
    pictures: dict[str, str] | None = None,
    confusion: Any = None,
    class_names: Sequence[str] = (),
) -> None:
    """report.html: one page, light and dark, without outside links. Call it on rank 0.

    tables: {caption: (header, rows) or (header, rows, footnote)}, results first; cells are shown as they are ("93.1 ±
    0.4"). pictures: {caption: PNG file in the run folder}, default samples.png if it exists. confusion: counts [C, C],
    row = true class. The curves come from metrics.jsonl, one chart for each "<chart>/.../<value>". All text is escaped.
    """
    if pictures is None:
        pictures = {"Real and generated samples": "samples.png"} if run.path("samples.png").exists() else {}
    curves, seconds, info = metrics.read(run.dir), run.seconds(), run.info
    parts = [_section(caption, _table(*table)) for caption, table in tables.items()]
    parts[1:1] = [_section("Notes", f'<p class="note">{escape(note)}</p>') for note in run.notes]
    for caption, file in pictures.items():
        parts.append(_section(caption, _image(run.path(file).read_bytes(), "png", caption)))
    if curves:
        images = [_drawn(curve_chart, name, lines) for name, lines in grouped(curves).items()]
        parts.append(_section("Curves", f'<div class="charts">{"".join(images)}</div>'))
    if confusion is not None:
        counts, names = plain(confusion), list(class_names) or [str(i) for i in range(len(confusion))]
        parts.append(_section("Confusion matrix", _drawn(confusion_chart, counts, names)))
        if worst := _worst(counts, names):
            parts.append(_section("Most frequent errors", _table(["true class", "taken for", "times"], worst)))
    if seconds:
        rows = [[stage, _duration(value)] for stage, value in [*seconds.items(), ("together", sum(seconds.values()))]]
        parts.append(_section("Time", _table(["stage", "time"], rows, "Interrupted attempts are included.")))
    versions = ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())
    commit = f"commit {info.get('git_commit')}{' with local changes' if info.get('git_dirty') else ''}"
    place = f"{info.get('world', 1)} process(es) on {info.get('device', 'cpu')}"
    note = f'<p class="note">{escape(f"{commit}; {place}; {versions}")}</p>'
    parts.append(_section("Command", f"<pre>{escape(str(info.get('command', '')))}</pre>{note}"))
    flags = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in info.get("args", {}).items())
    parts.append(f"<section><details><summary>All flags</summary><pre>{escape(flags)}</pre></details></section>")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f'<body><main><h1>{escape(title)}</h1><p class="summary">{escape(summary)}</p>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
    write_bytes(run.path("report.html"), page.encode(errors="replace"))


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _image(data: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _worst(counts: Sequence[Sequence[float]], names: Sequence[str]) -> list[list[Any]]:
    """The ten largest counts off the diagonal: [true class, predicted class, times]."""
    errors = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    return [[names[i], names[j], f"{n:g}"] for n, i, j in sorted(errors, key=lambda e: -e[0])[:10]]


# ---------------------------------------------------------------------------------------
# Charts


def grouped(curves: dict[str, dict[int, float | None]]) -> dict[str, dict[str, dict[int, float | None]]]:
    """{chart: {line: points}}: one chart for each first and last component of the names; the rest names the line."""
    groups: dict[str, dict[str, dict[int, float | None]]] = {}
    for name, points in curves.items():
        first, *middle = name.split("/")
        last = middle.pop() if middle else ""
        groups.setdefault(f"{first}: {last}" if last else first, {})["/".join(middle)] = points
    return groups


def curve_chart(title: str, lines: dict[str, dict[int, float | None]]) -> "Figure":
    """{line: {step: value}} -> a figure. A row has its own colour (above ten, its own marks), its seeds their dashes:
    lines "<row>-seed<S>" belong to one row, which has one entry in the legend."""
    from matplotlib.figure import Figure

    rows: dict[str, list[dict[int, float | None]]] = {}
    for name, points in lines.items():
        rows.setdefault(re.sub(r"[-_ ]?seed\d+$", "", name), []).append(points)
    labels = {
        row: _shown(row, 30) + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "") for row, seeds in rows.items()
    }
    # The legend stands below the axes, in as many columns as fit.
    columns = max(1, min(4, 62 // (9 + max(map(len, labels.values())))))
    legend = 0 if list(rows) == [""] else 0.19 * -(-len(rows) // columns) + 0.1
    figure = Figure(figsize=(4.6, 2.7 + legend), layout="constrained")
    axes = figure.add_subplot()
    for i, (row, seeds) in enumerate(rows.items()):
        for k, points in enumerate(seeds):
            known = [(x, y) for x, y in points.items() if y is not None]
            step = max(1, len(known) // 400)  # more points than pixels only make the page heavy
            known = known[::step] + (known[-1:] if (len(known) - 1) % step else [])
            axes.plot(
                *zip(*known, strict=True) if known else ([], []),
                color=COLOURS[i % len(COLOURS)],
                linestyle=DASHES[k % len(DASHES)],
                marker="o" if len(known) == 1 else MARKERS[i // len(COLOURS) % len(MARKERS)],
                markevery=max(1, len(known) // 8),
                markersize=4,
                linewidth=1.4,
                label=labels[row] if row and k == 0 else "_",
            )
    axes.set_title(_shown(title, 50), fontsize=10, loc="left", fontweight="bold")
    axes.grid(color="#dfe3e8", linewidth=0.6)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    if legend:
        figure.legend(loc="outside lower left", ncols=columns, fontsize=8, frameon=False, handlelength=2.2)
    return figure


def confusion_chart(counts: Sequence[Sequence[float]], names: Sequence[str]) -> "Figure":
    """Share of each true class (row) by predicted class (column); counts up to 20 classes, names up to 60."""
    from matplotlib.figure import Figure

    n = len(counts)
    side = max(3.0, min(9.0, 1.6 + 0.42 * n))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    shares = [[value / (sum(row) or 1) for value in row] for row in counts]
    # The square root lifts rare confusions out of the background.
    axes.imshow([[math.sqrt(share) for share in row] for row in shares], cmap="Blues", vmin=0, vmax=1)
    if n <= 60:
        small = 8 if n <= 20 else 6
        axes.set_xticks(range(n), [_shown(name, 20) for name in names], rotation=90, fontsize=small)
        axes.set_yticks(range(n), [_shown(name, 20) for name in names], fontsize=small)
    if n <= 20:
        for i, row in enumerate(counts):
            for j, value in enumerate(row):
                ink = "white" if shares[i][j] > 0.3 else "#1c2430"
                axes.text(j, i, f"{value:g}", ha="center", va="center", fontsize=8, color=ink)
    return figure


def roc_chart(path: str | Path, title: str, curves: dict[str, Sequence[tuple[Any, Any]]]) -> None:
    """PNG: receiver operating curves on log axes, a colour for each name. curves: {name: [(scores [N], bool [N])]}"""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(5, 5))
    axes = figure.add_subplot(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=title)
    axes.plot([1e-3, 1], [1e-3, 1], ":", color="grey")
    for color, (name, pairs) in zip(COLOURS, curves.items(), strict=False):
        for i, (score, positive) in enumerate(pairs):
            fpr, tpr, _ = roc_curve(positive, score)
            axes.plot(fpr, tpr, color=color, alpha=0.7, label=None if i else name)
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    write_bytes(path, data.getvalue())


def _drawn(chart: Callable[..., "Figure"], *what: Any) -> str:
    """The SVG of a chart. Equal figures give equal bytes; text stays text, in the reader's own fonts."""
    import matplotlib

    settings = {"svg.fonttype": "none", "svg.hashsalt": "0", "text.parse_math": False}
    data = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that matplotlib's font lacks, the reader's has
        chart(*what).savefig(data, format="svg", metadata={"Date": None})
    return _image(data.getvalue(), "svg+xml", what[0] if isinstance(what[0], str) else "confusion matrix")


def _shown(text: str, most: int) -> str:
    """On one line, cut to `most` letters, without what an SVG cannot hold."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
