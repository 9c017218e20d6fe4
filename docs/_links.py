"""Links from pages to files outside the site become the files' names; on a code host they stay
links.
"""

import re


def on_page_markdown(markdown, **_):
    """``[text](../tests/x.py)`` to ``text (`tests/x.py`)``."""
    return re.sub(
        r"\[([^\]]+)\]\((?:\.\./)+((?:tests|loopkit|tasks|benchmarks)/[^)#]*)\)",
        r"\1 (`\2`)",
        markdown,
    )
