"""What a notebook shows: during a run, of its result, and of Fit and Task."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from made_runs import Clock, evaluate, made_run, take_step

from loopkit import Checkpoint, Fit, Task
from loopkit.console import build_progress
from loopkit.console.html_progress import HtmlProgress
from loopkit.console.svg import curves
from tests.support import Tiny, quiet

ROOT = Path(__file__).parents[2]


def text_of(html: str) -> str:
    return re.sub(r"<[^>]+>", " ", html)


def test_the_bar_and_the_table_are_updated_in_place_and_the_best_row_is_bold():
    clock, shown = Clock(), []
    run = made_run(HtmlProgress(show=shown.append, clock=clock), metrics={"train/loss": 0.75})
    run.events.fit_start(run)
    assert "Digits: 9,610 parameters" in shown[-1]
    for loss in (0.5, 0.4, 0.6):
        for _ in range(100):
            take_step(run, clock, 0.01)
        evaluate(run, clock, loss=loss, **{"<accuracy>": 0.9})
    assert any("Evaluating" in each and "/8 batches" in each for each in shown)
    assert "Evaluating" not in shown[-1]
    assert '<progress max="1" value="0.7500"' in shown[-1]
    run.events.fit_end(run)
    page = ElementTree.fromstring(shown[-1])  # well-formed: names are escaped
    rows = list(page.iter("tr"))
    assert len(rows) == 1 + 3
    bold = ["font-weight:bold" in row[0].get("style") for row in rows]
    assert bold == [False, False, True, False]
    assert "Finished: 300 steps" in text_of(shown[-1])
    assert len(shown) < 40


def test_many_evaluations_keep_the_best_row_and_the_last_ones():
    clock, shown = Clock(), []
    run = made_run(HtmlProgress(show=shown.append, clock=clock))
    run.events.fit_start(run)
    for number in range(100):
        take_step(run, clock, 1.0)
        evaluate(run, clock, loss=1.0 + number)
    assert "40 earlier rows are not shown" in shown[-1]
    assert shown[-1].count("<tr>") == 1 + 1 + 60
    assert shown[-1].count("font-weight:bold") == len(re.findall("<th ", shown[-1]))


def test_a_notebook_gets_html_and_the_check_needs_no_widgets(monkeypatch):
    shell = SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert type(build_progress("auto")) is HtmlProgress
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert type(build_progress("auto")).__name__ == "PlainProgress"


def test_curves_leave_out_what_is_not_finite_and_thin_long_series():
    assert curves("loss", {"a": [], "b": [(1, float("nan"))]}) == ""
    points = [(step, 1 / step) for step in range(1, 10_001)]
    picture = ElementTree.fromstring(curves("x & y", {"a<b": points, "c": [(5, float("inf"))]}))
    (line,) = [part for part in picture if part.tag == "polyline"]
    places = line.get("points").split()
    assert 250 < len(places) <= 301
    xs = [float(place.split(",")[0]) for place in places]
    assert xs == sorted(xs)
    assert xs[-1] == 420 - 12


def test_a_result_fit_and_task_are_readable(tmp_path):
    result = quiet(epochs=2, log_every="1 step", checkpoint=True, run_dir=tmp_path).run(Tiny())
    page = ElementTree.fromstring(result._repr_html_())
    assert len(list(page.iter("polyline"))) == 2  # the two losses
    said = text_of(result._repr_html_())
    for part in (
        "finished",
        "peak memory",
        "best",
        "eval/loss",
        f"Tiny.load('{tmp_path}')".replace("'", "&#x27;"),
    ):
        assert part in said, part
    assert "history" not in repr(result)
    assert repr(Fit()) == "Fit()"
    assert repr(Fit(epochs=3, checkpoint=Checkpoint(keep=1))).startswith(
        "Fit(epochs=3, checkpoint=Checkpoint(every="
    )
    assert repr(Tiny(lr=1)).splitlines()[:2] == [
        "Tiny(count=60, lr=1, dropout=0.2, noisy=False)",
        "  (net): Sequential(",
    ]

    class Empty(Task):
        pass

    assert repr(Empty()) == "Empty()"


CELLS = (
    "import sys; {first}\nsys.path.insert(0, {root!r})\nimport os; os.chdir({folder!r})",
    "from loopkit import Fit\nfrom tests.support import Tiny\n"
    "result = Fit(epochs=3, run_dir='run', log_every='1 step').run(Tiny())",
    "result",
    "Tiny()",
)


@pytest.mark.long  # twelve seconds each
@pytest.mark.parametrize("widgets", [True, False])
def test_an_executed_notebook_shows_one_display_and_nothing_on_the_error_stream(widgets, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="needs pip install nbclient ipykernel")
    if widgets:
        pytest.importorskip("ipywidgets", reason="needs pip install ipywidgets")
    import nbformat

    first = "import ipywidgets" if widgets else "sys.modules['ipywidgets'] = None"
    values = {"first": first, "root": str(ROOT), "folder": str(tmp_path)}
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell.format(**values)) for cell in CELLS]
    )
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in book.cells]
    assert all(output.get("name") != "stderr" for each in outputs for output in each), outputs
    (shown,) = outputs[1]
    html = shown["data"]["text/html"]
    assert html.count("<tr>") == 1 + 3
    assert "Finished: 6 steps" in html
    assert "Epoch 3/3" in html
    (result,) = outputs[2]
    assert "<svg" in result["data"]["text/html"]
    assert outputs[3][0]["data"]["text/plain"].startswith("Tiny(count=60")
