"""The words of docs/glossary.md hold in code and pages, and no sentence of a page is too long."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
ROOMS = ("loopkit", "tasks", "benchmarks", "tests", "docs")
# Rooms and modules that still have words to replace. Remove an entry once it passes; add none.
PENDING = ()
PENDING_TWICE: set[str] = set()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# These files quote the words, or names of other libraries.
QUOTING = {
    Path(__file__),
    ROOT / "loopkit" / "foreign_names.py",
    ROOT / "loopkit" / "foreign_values.py",
    ROOT / "tests" / "test_foreign_values.py",
    ROOT / "tests" / "test_keywords.py",
}
CODE = sorted({path for room in ROOMS for path in (ROOT / room).rglob("*.py")} - QUOTING)
# Pages that list the names of earlier versions, or of other programs.
OLD_NAMES = {"glossary.md", "CHANGELOG.md", "from-trainer.md", "from-lightning.md"}
MOST_WORDS = 30

# A module may bear one of these names in several rooms: it is the same thing in each.
CONVENTIONAL = {"__init__", "base", "config", "fit", "evaluate", "predict"}

_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+)(.+?)\1", flags=re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_NAME_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@cache
def avoided() -> tuple[dict[str, str], dict[str, str], set[str]]:
    """The table of the glossary: phrases, names, and names that are allowed as attributes.

    Phrases and names are given with what to say in their place.
    """
    rows = GLOSSARY.read_text(encoding="utf-8").split("| we do not say |")[1].splitlines()[2:]
    phrases: dict[str, str] = {}
    names: dict[str, str] = {}
    attributes: set[str] = set()
    for row in rows:
        entries, ours = (cell.strip() for cell in row.strip("| ").split(" | "))
        for entry in entries.split(", "):
            if entry.startswith("`."):
                attributes.add(entry.strip("`."))
            elif entry.startswith("`"):
                names[entry.strip("`")] = ours
            else:
                phrases[entry] = ours
    return phrases, names, attributes


@cache
def _phrase_pattern() -> re.Pattern[str]:
    phrases = sorted(avoided()[0], key=len, reverse=True)
    spaced = (r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases)
    return re.compile(rf"(?<![\w`.-])(?:{'|'.join(spaced)})(?![\w`])", flags=re.IGNORECASE)


def phrases_in(text: str) -> list[str]:
    """The avoided phrases in prose, as they are written there."""
    return [re.sub(r"\s+", " ", hit[0]) for hit in _phrase_pattern().finditer(text)]


def parts(name: str) -> list[str]:
    """``_nextStep_9`` as ``["next", "step", "9"]``."""
    return [part.lower() for part in _NAME_PART.findall(name)]


@cache
def avoided_name(name: str) -> str | None:
    """The entry of the table that ``name`` falls under."""
    mine = parts(name)
    for entry in avoided()[1]:
        if entry[0].isupper() or entry.endswith("()"):
            if name.strip("_") == entry.removesuffix("()"):
                return entry
            continue
        wanted = parts(entry)
        if any(mine[i : i + len(wanted)] == wanted for i in range(len(mine) - len(wanted) + 1)):
            return entry
    return None


@lru_cache(maxsize=1)
def tokens_of(source: str) -> list[tokenize.TokenInfo]:
    """The tokens of Python source."""
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def names_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier of Python source that the table avoids."""
    before = ""
    for token in tokens_of(source):
        if token.type == tokenize.NAME:
            allowed = before == "." and token.string in avoided()[2]
            if not allowed and avoided_name(token.string):
                yield token.start[0], token.string
        before = token.string


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string and every run of comments in Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    comments: list[tuple[int, str]] = []
    for token in tokens_of(source):
        if token.type == tokenize.COMMENT:
            comments.append((token.start[0], token.string.lstrip("#: ")))
    while comments:
        line, text = comments.pop(0)
        last = line
        while comments and comments[0][0] == last + 1:
            last, more = comments.pop(0)
            text += " " + more
        yield line, text


def faults_of_code(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    found = [f"{line}: the name {name}" for line, name in names_in(source)]
    for line, text in prose_of(source):
        found += [f"{line}: {phrase!r}" for phrase in phrases_in(text)]
    return found


def faults_of_page(path: Path) -> list[str]:
    page = path.read_text(encoding="utf-8")
    if path == GLOSSARY:
        page = page.split("| we do not say |")[0]
    found = []
    blocks = [match[2] for match in _FENCE.finditer(page) if match[1] in ("python", "text", "")]
    prose = _CODE_SPAN.sub(" CODE ", _FENCE.sub("", page))
    for phrase in [*phrases_in(prose), *(hit for block in blocks for hit in phrases_in(block))]:
        found.append(f"{phrase!r}")
    if path.name not in OLD_NAMES:
        spans = [match[2] for match in _CODE_SPAN.finditer(_FENCE.sub("", page))]
        for text in [*blocks, *spans]:
            found += [
                f"the name {name}"
                for name in re.findall(r"(?<!\.)\b[A-Za-z_]\w*", text)
                if avoided_name(name)
            ]
    return found


def sentences(page: str) -> Iterator[str]:
    """The sentences of a page: no headings, tables, code blocks, comments or lists of links."""
    page = re.sub(r"<!--.*?-->", "", _FENCE.sub("\n\n", page), flags=re.DOTALL)
    page = _LINK.sub(r"\1", _CODE_SPAN.sub("CODE", page))
    page = re.sub(r"^(?:[|#]|:::|    options).*$", "\n", page, flags=re.MULTILINE)
    page = re.sub(r"^ *(?:[-*]|\d+\.) ", "\n\n", page, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", page):
        yield from re.split(r"[.?!][)\"*]*\s+", paragraph.strip())


def finished(paths: list[Path]) -> list[Path]:
    """Return the paths outside of the rooms that still have words to replace."""
    pending = [ROOT / entry for entry in PENDING]
    return [path for path in paths if not {path, *path.parents} & set(pending)]


def by_folder(paths: list[Path]) -> list[list[Path]]:
    """Return the paths of each folder: a test for each file would take longer than its work."""
    folders = sorted({path.parent for path in paths})
    return [[path for path in paths if path.parent == folder] for folder in folders]


def folder_of(files: list[Path]) -> str:
    return short(files[0].parent)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("files", by_folder(finished(CODE)), ids=folder_of)
def test_code_says_the_words_of_the_glossary(files):
    faults = [f"{short(path)}:{fault}" for path in files for fault in faults_of_code(path)]
    assert not faults, advice(faults)


@pytest.mark.parametrize("files", by_folder(finished(PAGES)), ids=folder_of)
def test_pages_say_the_words_of_the_glossary(files):
    faults = [f"{short(path)}: {fault}" for path in files for fault in faults_of_page(path)]
    assert not faults, advice(faults)


def advice(faults: list[str]) -> str:
    return "docs/glossary.md has the words to use instead:\n" + "\n".join(faults)


@pytest.mark.parametrize("files", by_folder(PAGES), ids=folder_of)
def test_a_sentence_of_a_page_can_be_read_in_one_breath(files):
    long = [
        f"{short(path)}: {sentence}"
        for path in files
        for sentence in sentences(path.read_text(encoding="utf-8"))
        if len(sentence.split()) > MOST_WORDS
    ]
    assert not long, f"over {MOST_WORDS} words: " + "\n\n".join(long)


def test_the_search_finds_words_and_leaves_their_neighbours_alone():
    assert phrases_in("It goes\non. Steamy, the wording, goes one.") == ["goes on"]
    assert phrases_in("The first rank; FIRST RANK") == ["first rank", "FIRST RANK"]
    hits = list(
        names_in("_agenda_next = Batches(batches, x.stem, why=all_gather(place))\nstem = 1")
    )
    assert [name for _, name in hits] == ["_agenda_next", "Batches", "why", "stem"]
    assert not list(names_in("steam = feedback = whys = Placement = teammate"))
    assert [text for _, text in prose_of("# one\n# two\nx = f'a{x}b'  # three")][
        -1
    ] == "one two three"
    long = "word " * (MOST_WORDS + 1)
    page = f"# {long}\n\n| {long} |\n\n```text\n{long}\n```\n\nShort `{long}`. Two.\n- {long}\n- {long}"
    assert sum(len(sentence.split()) > MOST_WORDS for sentence in sentences(page)) == 2


def test_a_public_name_is_one_thing():
    classes: dict[str, list[str]] = defaultdict(list)
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "loopkit").rglob("*.py")):
        where = str(path.relative_to(ROOT))
        if path.stem not in CONVENTIONAL:
            modules[path.stem].append(where)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(where)
    twice = {n: at for names in (classes, modules) for n, at in names.items() if len(at) > 1}
    assert not twice.keys() - PENDING_TWICE, twice
