"""The site: its build refuses what a reader would stumble over, and its pages keep their promises."""

from __future__ import annotations

import ast
import html
import re
import shutil

import pytest

from loopkit.errors import NotFiniteError
from tests.docs import (
    drawing,
    front_page,
    guide_pictures,
    guide_screens,
    lightning_tables,
    pictures,
    terminal,
)
from tests.docs.pages import DOCS, ROOT, blocks, rows_of

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WIDEST = 88
TERMINALS = {"recording", *guide_screens.PICTURES}  # dark in both themes
WITHOUT_PICTURE = {
    "support.md",  # it is itself a table of what is tested
    "ray.md",  # its claims are about machines that Ray starts and loses
}


def build(folder, page):
    """Build a site of one page with the settings of the real one."""
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    shutil.copy(ROOT / "mkdocs.yml", folder)
    (folder / "docs").mkdir()
    shutil.copy(DOCS / "_site.py", folder / "docs")
    (folder / "CHANGELOG.md").write_text("# Changelog\n")
    (folder / "docs/index.md").write_text("# Home\n\n" + page)
    build(
        config.load_config(
            str(folder / "mkdocs.yml"),
            nav=[{"Home": "index.md"}, {"Changelog": "changelog.md"}],
            theme={"name": "mkdocs"},
            plugins=[],
        )
    )


GOOD = "[a](changelog.md), [b](#home)\n\n| one | two |\n|---|---|\n| `a | b` | 2 |\n\n`x | y`\n"


def test_the_build_takes_a_good_page(tmp_path):
    build(tmp_path, GOOD + "\nAbout 1e-6, `1e-6`.\n\n```python\nx = 1e-6\n```\n")
    assert (tmp_path / "site/changelog.html").exists()
    page = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert page.count('<span class="number">1e-6</span>') == 1
    assert '<div data-search-exclude class="language-python' in page  # examples are not found


@pytest.mark.parametrize(
    "fault",
    [
        "[a](nowhere.md)",
        "[a](changelog.md#nowhere)",
        "![a](nowhere.svg)",
        "| one | |\n|---|---|\n| 1 | 2 |\n",
        "| one | two |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |\n",
    ],
    ids=["page", "anchor", "picture", "empty-head", "stray-pipe"],
)
def test_the_build_fails_on(fault, tmp_path):
    from mkdocs.exceptions import Abort

    with pytest.raises(Abort):
        build(tmp_path, GOOD + "\n" + fault)


def test_make_docs_hides_no_warning():
    recipe = (ROOT / "Makefile").read_text().split("\ndocs:")[1].split("\n\n")[0]
    assert "--strict" in recipe
    assert "-q" not in recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_fits_beside_both_menus(page):
    wide = [
        f"{block.line + number}: {line}"
        for block in blocks(page)
        if block.language in ("python", "sh")
        for number, line in enumerate(block.text.splitlines())
        if len(line) > WIDEST
    ]
    assert not wide, "\n".join(wide)


def test_every_page_is_in_the_menu_once():
    menu = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1])
    listed = [name for name in menu if (DOCS / name).exists() or name == "changelog.md"]
    on_disk = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | {"changelog.md"}
    assert on_disk <= set(listed)


def test_the_tables_for_lightning_are_what_the_code_makes():
    pytest.importorskip("lightning.pytorch")
    page = lightning_tables.PAGE.read_text(encoding="utf-8")
    assert page == lightning_tables.written(page), (
        "to update it, run: python -m tests.docs.lightning_tables"
    )


def messages():
    """The texts of the package, with … for each value."""
    for path in (ROOT / "loopkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_each_message_of_the_troubleshooting_page_is_one_of_the_package():
    table = rows_of(DOCS / "troubleshooting.md")
    shown = [row[0].strip("`") for row in table if row[0].startswith("`") and "…" in row[0]]
    assert len(shown) > 10
    texts = list(messages())
    for message in shown:
        pattern = re.compile(".*".join(map(re.escape, filter(None, message.split("…")))), re.DOTALL)
        assert any(map(pattern.search, texts)), message


def test_the_front_page_shows_the_numbers_of_the_benchmarks():
    for page in front_page.FRONT:
        text = page.read_text(encoding="utf-8")
        assert text == front_page.written(text), (
            "to update it, run: python -m tests.docs.write_pages"
        )


def test_a_picture_is_there_in_both_forms_and_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in pictures.PICTURES:
        assert f"pictures/{name}.svg" in text, name
        assert (drawing.FOLDER / f"{name}.svg").exists()
        if name not in TERMINALS:
            assert (drawing.FOLDER / f"{name}-dark.svg").exists()


def test_each_guide_has_a_picture_where_a_picture_can_show_its_claim():
    menu = (ROOT / "mkdocs.yml").read_text().split("  - Guides:\n")[1].split("  - Tasks:\n")[0]
    guides = re.findall(r"[\w-]+\.md", menu)
    assert set(guides) >= WITHOUT_PICTURE
    for name in [*set(guides) - WITHOUT_PICTURE, "index.md"]:
        assert re.search(r"^!\[", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_picture_of_the_loop_shows_the_events_of_a_run():
    events = guide_pictures.first_epoch(drawing.page_code("loop.md", 1)["trace"].seen)
    drawn = guide_pictures.loop_drawing(events, drawing.LIGHT).svg()
    assert drawn == (drawing.FOLDER / "loop.svg").read_text(encoding="utf-8"), (
        "to update it, run: python -m tests.docs.pictures loop"
    )


def test_the_picture_of_hooks_shows_what_those_of_the_page_do():
    numbers = r"\d\.\d'"  # the loss, of random weights
    drawn = guide_pictures.hooks_drawing(guide_pictures.stopped(), drawing.LIGHT).svg()
    on_disk = (drawing.FOLDER / "hooks.svg").read_text(encoding="utf-8")
    assert re.sub(numbers, "", drawn) == re.sub(numbers, "", on_disk), (
        "to update it, run: python -m tests.docs.pictures hooks"
    )


def test_the_picture_of_a_task_shows_the_calls_of_its_methods():
    drawn = guide_pictures.calls_drawing(guide_pictures.calls(), drawing.LIGHT).svg()
    assert drawn == (drawing.FOLDER / "task.svg").read_text(encoding="utf-8"), (
        "to update it, run: python -m tests.docs.pictures task"
    )


def test_the_picture_of_a_stream_shows_each_sample_once():
    drawn = (drawing.FOLDER / "streams.svg").read_text(encoding="utf-8")
    cells = re.findall(r">(\d+)  (\d+)<", drawn)
    assert sorted(int(number) for cell in cells for number in cell) == list(range(24))


def test_the_picture_of_fine_tuning_has_a_line_for_each_way():
    for way in ("from scratch", "pretrained body", "Unfreeze", "a lower rate", "the head alone"):
        assert way in shown("fine-tuning")


def shown(name):
    """What a picture shows, as one text."""
    drawn = (drawing.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    lines = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    return html.unescape("\n".join(lines)).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("clusters", ["ended, as one on another machine did", "SIGKILL", "resumed  runs/points/checkpoints/step-"]),
        ("eject", ["the same weights: True"]),
        ("export", ["shipped/model.safetensors", "loopkit was imported: False"]),
        ("storage", ["stopped at step 7", "ok   s3://bucket/runs/a/", "finished at step 18"]),
        ("testing", ["1 failed", "2 passed", "stopped at step 1 and resumed is another run", "get_extra_state"]),
        ("transformers", ["HFTask: 35,138 parameters", "config.json", "a very dull film {'label':"]),
    ],
)  # fmt: skip
def test_the_screens_of_the_guides_show_what_their_pages_say(name, texts):
    for text in texts:
        assert text in shown(name)


def test_the_screen_of_a_loss_that_is_not_finite_names_the_layer_of_the_page():
    code = drawing.page_code("troubleshooting.md", 1)
    named = "step 2 (epoch 0): the output of net.0 (Linear)"
    with pytest.raises(NotFiniteError, match=re.escape(named)):
        code["Fit"](epochs=5, debug="numerics", **code["quiet"]).run(code["Points"](1e9, 1e30))
    assert named in shown("troubleshooting")


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
def test_a_picture_shows_nothing_of_the_machine_that_drew_it(name):
    for path in drawing.FOLDER.glob(f"{name}*.svg"):
        drawn = path.read_text(encoding="utf-8")
        assert not re.search(r"/tmp/|/home/|/root/|/work/", drawn)


@pytest.mark.long  # a plan for each of ten bars
@pytest.mark.parametrize("name", ["memory", "strategies"])
def test_the_bars_of_memory_are_those_of_a_plan(name):
    bars = guide_pictures.plans(vars(guide_pictures)[name.upper()])
    drawn = (drawing.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    shown = [float(gb) for gb in re.findall(r">([\d.]+) GB<", drawn)]
    planned = [sum(bar.parts.values()) / 1e9 for bar in bars]
    assert shown == pytest.approx(planned, abs=0.06), (
        f"to update it, run: python -m tests.docs.pictures {name}"
    )


def test_the_bars_show_the_results_on_disk():
    from benchmarks import record

    drawn = (drawing.FOLDER / "benchmarks.svg").read_text(encoding="utf-8")
    for rows in record.results()["overhead"]["settings"].values():
        for name, row in rows.items():
            assert f">{name}<" in drawn
            assert f">{row['step']['median']:.0f}<" in drawn, (
                "to update it, run: python -m tests.docs.pictures benchmarks"
            )


def test_a_screen_shows_what_a_terminal_would():
    screen = terminal.Screen(width=6)
    screen.write("one\r\n\x1b[32mtwo\x1b[0m\r\n")
    screen.write("three\r\x1b[2Kbar\x1b[1A\r\x1b[1mT\x1b[0m\x1b[?25l\r\n\nabcdefgh")
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in screen.text().splitlines()]
    assert plain == ["one", "Two", "bar", "abcdef", "gh"]
    assert "\x1b[1mT" in screen.text()
    assert "\x1b[32mwo" in screen.text()
    drawn = terminal.Recording(terminal.Screen(), [screen.text(), "loss 0.123456"], [1.0, 1.0]).svg(
        "two"
    )
    assert "0.123456" in drawn
    with pytest.raises(ValueError, match="unknown"):
        screen.write("\x1b[5n")
