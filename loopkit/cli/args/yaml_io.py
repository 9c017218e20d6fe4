"""YAML as configs hold it: numbers such as 1e-3 are numbers, and dates are text."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import YAMLError as YAMLError

_FLOAT = "tag:yaml.org,2002:float"
_DATE = "tag:yaml.org,2002:timestamp"
# PyYAML follows YAML 1.1, in which 1e-3 is a string: there a float needs a "." and a signed power.
_NUMBER = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
    r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader with these rules for numbers and dates."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in (_FLOAT, _DATE)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """PyYAML's safe writer; quotes what the loader would not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_Loader.add_implicit_resolver(_FLOAT, _NUMBER, list("-+0123456789."))  # shared with the dumper


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def dump_yaml(value: Any) -> str:
    """Return a plain value as a YAML document, in the order that dicts have."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
