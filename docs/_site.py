"""What loopkit adds to the build of its site: links, the changelog, search, and checks of the pages.

mkdocs calls these functions. A strict build fails on each warning.
"""

import logging
import re
from pathlib import Path

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks.site")

# How much a page counts in the search: guides come before records of the project.
_BOOST = {"decisions/": 0.01, "coverage.md": 0.01, "changelog.md": 0.01, "lifecycle.md": 0.05,
          "architecture.md": 0.05, "trainer-guide/": 0.2, "reference/": 0.3, "tasks/": 0.5}  # fmt: skip
_CODE = re.compile(
    r"<pre.*?</pre>|<code.*?</code>|<svg.*?</svg>|<script.*?</script>", re.DOTALL
)
_CODE_OR_TAG = re.compile(
    r"(<pre.*?</pre>|<code.*?</code>|<svg.*?</svg>|<script.*?</script>|<[^>]*>)",
    re.DOTALL,
)
_HERE = Path(__file__).parent
_PICTURE = re.compile(
    r'(?P<start><img[^>]*src="[^"]*pictures/)(?P<name>[\w-]+)\.svg(?P<end>"[^>]*>)'
)
_TABLE = re.compile(r"<table.*?</table>", re.DOTALL)


def on_files(files, config):
    """Add the changelog, which stands at the root of the repository."""
    text = (Path(config.config_file_path).parent / "CHANGELOG.md").read_text(
        encoding="utf-8"
    )
    files.append(
        File.generated(config, "changelog.md", content=text.replace("](docs/", "]("))
    )
    return files


def on_page_markdown(markdown, page, **_):
    """Weigh the page for the search, and turn links to files outside the site into their names.

    On a code host they stay links.
    """
    boosts = [
        weight
        for start, weight in _BOOST.items()
        if page.file.src_uri.startswith(start)
    ]
    if boosts and "search" not in page.meta:
        page.meta["search"] = {"boost": boosts[0]}
    return re.sub(
        r"\[([^\]]+)\]\((?:\.\./)+((?:tests|loopkit|tasks|benchmarks)/[^)#]*)\)",
        lambda link: f'<span class="path">{_breakable(link[1])} (`{link[2]}`)</span>',
        markdown,
    )


def _breakable(name):
    """Return a long name with places where a browser may break it."""
    return name.replace("_", "_<wbr>") if name.startswith("test_") else name


def on_page_content(html, page, **_):
    """Warn of tables that nobody can read, and leave examples out of the search."""
    prose = _CODE.sub("code", html)
    if re.search(r"<th[^>]*>\s*</th>", prose):
        log.warning("%s: a table has an empty head: name the column", page.file.src_uri)
    for stray in re.findall(r"[^<>]*\|[^<>]*", _TABLE.sub("", prose)):
        log.warning(
            "%s: a pipe outside of a table: %r", page.file.src_uri, stray.strip()[:60]
        )
    html = _PICTURE.sub(_in_both_forms, html)
    html = "".join(_in_one_piece(part) for part in _CODE_OR_TAG.split(html))
    return html.replace(
        '<div class="language-', '<div data-search-exclude class="language-'
    )


def _in_one_piece(part):
    """Return a text or an element in which 1e-6 and --port cannot be broken at their signs."""
    if re.fullmatch("<code>--.{1,24}</code>", part):
        return part.replace("<code>", '<code class="number">', 1)
    if part.startswith("<"):
        return part
    return re.sub(
        r"(?<![\w.-])(\d[\d.]*e-\d+)", r'<span class="number">\1</span>', part
    )


def _in_both_forms(found):
    """Return two images, for the light and the dark theme, where a picture has a dark form."""
    if not (_HERE / "pictures" / f"{found['name']}-dark.svg").exists():
        return found[0]
    light, dark = (
        f"{found['name']}.svg#only-light",
        f"{found['name']}-dark.svg#only-dark",
    )
    return "".join(found["start"] + form + found["end"] for form in (light, dark))
