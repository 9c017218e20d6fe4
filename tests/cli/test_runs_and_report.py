"""``loopkit runs`` and ``loopkit report``: lists, comparisons, JSON and the page."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopkit.cli.main import main
from loopkit.cli.report.command import read_runs
from loopkit.cli.report.html_page import html_page
from loopkit.cli.report.payload import payload
from loopkit.cli.report.run_data import read_run, same_but_seed
from loopkit.cli.report.series import thinned
from loopkit.cli.report.serve import PageServer, files_state
from tests.cli import chromium, compared_runs
from tests.cli.chromium import Browser

needs_chromium = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="there is no Chromium: apt install chromium, or set $CHROMIUM"
)
NAMES = [f"lr-{lr}-seed-{seed}" for lr in (0.002, 0.02) for seed in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    return compared_runs.make(tmp_path_factory.mktemp("compared") / "runs")


@pytest.fixture(scope="module")
def page(runs) -> Path:
    path = runs[0].parents[1] / "out.html"
    assert main(["report", str(runs[0].parent), "--html", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def listed(loopkit, *options: object) -> list[dict]:
    return [json.loads(line) for line in loopkit.ok("runs", "--json", *options).splitlines()]


def test_runs_are_listed_sorted_and_filtered(loopkit, runs):
    folder = runs[0].parent
    head, *rows = loopkit.ok("runs", folder).splitlines()
    assert {"status", "seed", "lr"} <= set(head.split())
    assert [row.split()[:2] for row in rows] == [[str(path), "finished"] for path in runs]
    best = {row["run"]: row["best"] for row in listed(loopkit, folder)}
    order = [row["run"] for row in listed(loopkit, folder, "--sort", "best")]
    assert order == sorted(best, key=best.get)
    assert [row["run"] for row in listed(loopkit, folder, "--sort=-best")] == order[::-1]
    found = listed(loopkit, folder, "--where", "lr>=0.01", "--where", "seed=1")
    assert [row["run"] for row in found] == [str(runs[3])]
    assert listed(loopkit, folder, "--where", "status!=finished") == []
    assert "Did you mean 'status'?" in loopkit.refused("runs", folder, "--where", "sttaus=x")
    assert loopkit("runs", folder / "nowhere")[0] == 1


def test_several_runs_are_compared_as_text_and_as_json(loopkit, runs):
    text = loopkit.ok("report", *runs)
    settings = text.split("settings that differ")[1].split("\n\n")[0].splitlines()
    assert settings[1].split() == NAMES
    assert [line.split() for line in settings[2:]] == [
        ["seed", "0", "1", "0", "1"],
        ["lr", "0.002", "0.002", "0.02", "0.02"],
    ]
    values = json.loads(loopkit.ok("report", "--json", *runs))
    assert values["differing"] == ["seed", "lr"]
    assert values["groups"] == [[0, 1], [2, 3]]
    killed = values["runs"][3]
    assert [attempt["status"] for attempt in killed["attempts"]] == ["killed", "finished"]
    assert killed["attempts"][1]["from_step"] == 18
    assert [attempt["to_step"] for attempt in killed["attempts"]] == [18, 48]
    assert killed["timings"]["step"] > 0
    rows = read_run(runs[3]).rows
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert killed["curves"]["train/loss"]["value"] == pytest.approx(losses, rel=1e-5)
    axis = killed["axes"][killed["curves"]["train/loss"]["axis"]]
    assert axis["time"] == sorted(axis["time"])
    assert killed["best"]["value"] == min(row["eval/loss"] for row in rows if "eval/loss" in row)
    assert [each["kind"] for each in killed["arrays"]] == ["matrix"]


def test_a_report_of_a_resumed_run_shows_its_attempts(loopkit, runs):
    lines = [line.split() for line in loopkit.ok("report", runs[3]).splitlines()]
    assert ["status", "finished"] in lines
    assert [line[-1] for line in lines if line and line[0] in ("1", "2")][:2] == [
        "killed",
        "finished",
    ]


def test_options_of_report_that_exclude_each_other_are_refused(loopkit, runs, tmp_path):
    assert "one of" in loopkit.refused("report", runs[0], "--json", "--watch")
    code, _, err = loopkit("report", tmp_path)
    assert (code, "holds no run" in err) == (1, True)


def test_runs_are_a_group_if_seeds_alone_differ(runs):
    assert same_but_seed(read_runs(runs)) == [[0, 1], [2, 3]]
    assert same_but_seed(read_runs(runs[1:3])) == [[0], [1]]


def test_a_long_curve_keeps_its_extremes():
    values = [float(n % 100) for n in range(50_000)]
    values[31_234] = 1e6
    values[777] = -5.0
    kept = thinned(values, 200)
    assert len(kept) <= 202
    assert {0, 777, 31_234, 49_999} <= set(kept)
    assert thinned(values[:150], 200) == list(range(150))


def test_the_page_needs_nothing_else_and_takes_names_as_text(page):
    text = page.read_text(encoding="utf-8")
    assert "The MIT License" in text
    assert "<b>odd</b>" not in text  # a name that was logged
    assert re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text) is None
    assert "connect-src 'self'" in text
    assert "unsafe" not in text.partition("</head>")[0].partition("<style>")[0]


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_drawn_from_a_file(browser, page, width, theme):
    browser.show(page.as_uri(), width, theme)
    assert browser.js("document.documentElement.scrollWidth") == width
    assert browser.js("document.documentElement.dataset.theme") == theme
    titles = browser.js("[...document.querySelectorAll('.chart h3')].map((each) => each.innerText)")
    assert titles == ["Loss", "Accuracy", "Learning rate", "Gradient norm", "<b>odd</b>"]
    # Each canvas has lines on it.
    assert browser.js(
        "charts.every(({ chart: { ctx } }) => ctx.getImageData(0, 0, ctx.canvas.width, "
        "ctx.canvas.height).data.some((value) => value > 0))"
    )
    assert browser.js("document.querySelectorAll('.bar').length") > 4
    labels = browser.js("[...document.querySelectorAll('.matrix .label')].map((e) => e.innerText)")
    names = [*compared_runs.Shown.class_names]
    assert list(filter(None, labels)) == [*names, *names]
    assert not browser.problems


@needs_chromium
def test_a_pointer_shows_the_values_of_all_runs(browser, page, runs):
    browser.show(page.as_uri())
    browser.js("document.querySelector('.u-over').scrollIntoView({block: 'center'})")
    left, top, width = browser.js(
        "(() => { const r = document.querySelector('.u-over').getBoundingClientRect(); "
        "return [r.left, r.top, r.width] })()"
    )
    browser.move(left + 5, top + 20)
    browser.move(left + width - 2, top + 40)
    text = browser.wait("document.querySelector('.tip:not([hidden])').innerText")
    last = {name: read_run(path).last["train/loss"] for name, path in zip(NAMES, runs)}
    assert text.splitlines()[0] == "step 48"
    shown = dict(zip(text.splitlines()[1::2], text.splitlines()[2::2]))
    values = {name: float(shown[f"{name} train/loss"]) for name in NAMES}
    assert values == pytest.approx(last, abs=1e-4)


@needs_chromium
def test_smoothing_log_scale_axes_and_seeds_change_the_curves(browser, page):
    browser.show(page.as_uri())
    line = "charts[0].chart.data[charts[0].lines.findIndex((each) => !each.faint) + 1].filter((y) => y != null)"
    raw = browser.js(line)
    slider = "const s = document.querySelector('input[type=range]'); s.value = 0.9; s.dispatchEvent(new Event('input'))"
    browser.js(f"(() => {{ {slider} }})()")
    smooth = browser.wait(f"charts[0].lines.some((each) => each.faint) && {line}")
    assert len(smooth) == len(raw)
    mean, expected, total = 0.0, [], 0.0
    for value in raw:
        mean, total = 0.9 * mean + 0.1 * value, 0.9 * total + 0.1
        expected.append(mean / total)
    assert smooth == pytest.approx(expected)
    browser.click("#log")
    assert browser.js("charts[0].chart.scales.y.distr") == 3
    browser.click("[data-value=epoch]")
    assert browser.js("Math.max(...charts[0].chart.data[0])") == 8
    browser.click("#seeds")
    keys = browser.js("[...document.querySelectorAll('#keys .key')].map((each) => each.innerText)")
    assert keys == ["lr 0.002 (2 seeds)", "lr 0.02 (2 seeds)"]
    assert browser.js("charts[0].chart.bands.length") == 4
    assert not browser.problems


@needs_chromium
def test_a_click_on_a_head_sorts_and_a_box_hides_a_run(browser, page, runs):
    browser.show(page.as_uri())
    order = "[...document.querySelectorAll('#runs tbody tr')].map((row) => row.dataset.run)"
    assert browser.js(order) == NAMES
    best = {name: read_run(path).best_value() for name, path in zip(NAMES, runs)}
    head = "#runs th:nth-child(5) button"
    assert (
        browser.js(f"document.querySelector({head!r}).innerText").strip("↕↑↓ ") == "best eval/loss"
    )
    browser.click(head)
    assert browser.js(order) == sorted(best, key=best.get)
    browser.click(head)
    assert browser.js(order) == sorted(best, key=best.get, reverse=True)
    lines = browser.js("charts[0].lines.length")
    browser.click("#runs tbody input")
    assert browser.wait(f"charts[0].lines.length < {lines}")
    assert not browser.problems


@pytest.fixture
def served(runs, tmp_path) -> Iterator[tuple[PageServer, Path]]:
    """The page of one run of which the log is a copy, so that it can grow."""
    for name in ("metrics.jsonl", "run.json"):
        (tmp_path / name).write_bytes((runs[0] / name).read_bytes())
    server = PageServer(
        lambda: payload(read_runs([tmp_path]), live=True),
        lambda: files_state([tmp_path], ["running"]),
        port=0,
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server, tmp_path
    server.shutdown()
    server.server_close()


def log_row(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        row = {"step": 77, "time": time.time(), "train/loss": 0.125, "epoch": 12.5}
        file.write(json.dumps(row) + "\n")


def test_a_live_page_sends_what_has_changed_and_to_this_machine_alone(served):
    server, run_dir = served

    def ask(path: str, **headers: str) -> tuple[int, str, str | None]:
        request = urllib.request.Request(server.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode(), answer.headers["ETag"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), None

    assert ask("")[1].startswith("<!DOCTYPE html>")
    _, text, tag = ask("data")
    assert json.loads(text)["runs"][0]["step"] == 48
    assert ask("data", **{"If-None-Match": tag})[0] == 304
    log_row(run_dir)
    code, text, _ = ask("data", **{"If-None-Match": tag})
    assert (code, json.loads(text)["runs"][0]["step"]) == (200, 77)
    assert ask("data", Host="evil.example:80")[0] == 403
    assert ask("../etc/passwd")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


@needs_chromium
def test_a_new_row_is_on_the_live_page_within_3_seconds(browser, served):
    server, run_dir = served
    browser.show(server.url)
    log_row(run_dir)
    began = time.monotonic()
    browser.wait("charts.length && Math.max(...charts[0].chart.data[0]) === 77")
    assert time.monotonic() - began < 3
    assert not browser.problems


def test_a_page_of_an_older_run_without_run_json_is_made(runs, tmp_path):
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in row.items() if k != "time"}) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    values = payload([read_run(tmp_path)])
    assert values["runs"][0]["status"] == "unknown"
    assert set(values["runs"][0]["axes"][0]["time"]) == {None}
    assert "unknown" in html_page(values)
