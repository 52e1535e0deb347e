"""Tables and the report page: what it shows, and that no text of the user's becomes markup."""

import base64
import html.parser
import math
import re
import xml.etree.ElementTree as xml
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import report as R
from common.run import open_run

ONE = SimpleNamespace(rank=0, world=1, device="cpu", main=True)
EVIL = '\x07\udce9$\\frac{1}$<b>&"</b><script>alert(1)</script>'


def test_mean_and_spread():
    assert R.mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert R.mean_std([4.0]) == (4.0, 0.0)
    assert R.spread([92.5, 93.5, 94.5]) == "93.5 ± 1.0" and R.spread([90]) == "90.0" and R.spread([]) == "not run"


def test_rows_over_seeds():
    assert R.over_seeds([1.0, 2.0, 6.0]) == dict(mean=3.0, std=pytest.approx(math.sqrt(7)), per_seed=[1.0, 2.0, 6.0])
    runs = [dict(test=90.0, val=80.0), dict(test=92.0)]  # one of them had no validation images
    assert R.means(runs, "test", "val", "updates") == dict(test=91.0, val=80.0)
    assert R.means([], "test") == {}


def test_accuracy_of_each_class():
    labels, predicted = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 0])
    assert R.per_class(predicted, labels, ["cat", "dog"]) == dict(cat=50.0, dog=75.0)


def test_print_table(capsys):
    R.print_table(["set", "top-1"], [["real only", "93.1 ± 0.4"], ["x", 5]])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines == ["set        top-1", "---------  ----------", "real only  93.1 ± 0.4", "x          5"]


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects text and what is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.sources, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("n", [3, 30])
def test_report_is_one_safe_page(tmp_path, n):
    names = [EVIL, *(f"class {i}" for i in range(1, n))]
    run = open_run("s", dict(output_dir=str(tmp_path / "r"), note=EVIL, stages=["draw"]), ONE)
    for step in range(1, 30):
        run.log(step, **{"learn/loss": 1 / step, f"learn/{EVIL}/top1": float(step), "learn/b/top1": 3.0})
    run.log(1, **{"test/top1": float("nan")})
    with run.timed("draw"):
        pass
    run.done("draw")
    Image.new("RGB", (8, 8), "red").save(run.path("samples.png"))
    table = {EVIL: ([EVIL, "top-1"], [[EVIL, "93.1 ± 0.4"], ["zero-shot", 50]], "a footnote " + EVIL)}
    counts = torch.eye(n, dtype=torch.long) * 7
    counts[0, 1] = 5
    R.report(run, EVIL, EVIL, table, None, counts, names)

    text = run.path("report.html").read_text()
    found = Page(text)
    assert not {"script", "b"} & set(found.tags)
    assert all(re.match("data:image/(png|svg.xml);base64,", source) for source in found.sources)
    assert "http" not in text and "url(" not in text and "prefers-color-scheme: dark" in text
    words = "".join(found.text)
    assert EVIL[2:] in words and "93.1 ± 0.4" in words and "a footnote" in words
    assert words.index("93.1") < words.index("Curves")  # the result comes first
    assert words.count("taken for") == 1 and "draw" in words and "together" in words

    charts = [base64.b64decode(s.partition(",")[2]) for s in found.sources if "svg" in s]
    shown = ["".join(xml.fromstring(chart).itertext()) for chart in charts]  # well-formed, whatever stands in it
    assert len(charts) == 4 and "learn: top1" in shown[1] and "$\\frac{" in shown[1] + shown[3]
    assert ("class 2" in shown[3]) and ("7" in shown[3])
    run.close()


def lines_of(figure):
    return figure.axes[0].get_lines()


def test_twelve_rows_are_told_apart():
    rows = {f"row {i}": {0: 1.0, 1: float(i)} for i in range(24)}
    figure = R.curve_chart("loss", rows)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines_of(figure)}
    assert len(looks) == 24
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(rows)


def test_seeds_share_the_colour_of_their_row():
    lines = {f"{row}-seed{s}": {0: 1.0, 1: 2.0} for row in ("real", "pooled") for s in range(3)}
    figure = R.curve_chart("loss", lines)
    assert len({line.get_color() for line in lines_of(figure)}) == 2
    assert len({(line.get_color(), line.get_linestyle()) for line in lines_of(figure)}) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["real (3 seeds)", "pooled (3 seeds)"]


def test_curves_stay_small_and_leave_gaps_out():
    xs, ys = lines_of(R.curve_chart("loss", {"": {i: float(i) for i in range(10_001)}}))[0].get_data()
    assert len(xs) <= 402 and xs[-1] == 10_000 and list(xs) == list(ys)
    assert list(lines_of(R.curve_chart("loss", {"": {1: 1.0, 2: None, 3: 2.0}}))[0].get_xdata()) == [1, 3]
    assert lines_of(R.curve_chart("loss", {"": {3: 1.0}}))[0].get_marker() == "o"  # a single value is a dot
    R.curve_chart("loss", {"": {1: None}})


def test_charts_by_first_and_last_name():
    found = R.grouped({"a/x/loss": {1: 1.0}, "a/y/loss": {1: 2.0}, "a/loss": {1: 3.0}, "b": {1: 4.0}, "a/x/y/top1": {}})
    assert {chart: list(lines) for chart, lines in found.items()} == {
        "a: loss": ["x", "y", ""],
        "b": [""],
        "a: top1": ["x/y"],
    }


def test_many_classes_fit_the_page():
    figure = R.confusion_chart([[int(i == j) for j in range(300)] for i in range(300)], [str(i) for i in range(300)])
    assert max(figure.get_size_inches()) <= 9 and not figure.axes[0].texts
