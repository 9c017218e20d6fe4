"""The script: the pieces that a run needs, rendered from their templates and joined."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from loopkit.cli.eject.layout import fold, import_lines
from loopkit.cli.eject.refusals import refuse
from loopkit.cli.eject.source import Import

# What the templates may use. Only what the script uses is imported.
_OFFERED = (
    *(
        Import(module, None, module)
        for module in ("argparse", "gc", "math", "os", "random", "re", "torch")
    ),
    Import("torch.distributed", None, "dist"),
    Import("numpy", None, "np"),
    Import("collections.abc", "Iterable", "Iterable"),
    Import("collections.abc", "Iterator", "Iterator"),
    Import("collections.abc", "Mapping", "Mapping"),
    Import("contextlib", "nullcontext", "nullcontext"),
    Import("fractions", "Fraction", "Fraction"),
    Import("itertools", "islice", "islice"),
    Import("pathlib", "Path", "Path"),
    Import("typing", "Any", "Any"),
    Import("zlib", "crc32", "crc32"),
    *(
        Import("peft", name, name)
        for name in ("get_peft_model_state_dict", "set_peft_model_state_dict")
    ),
    Import("torch", "Tensor", "Tensor"),
    Import("torch", "nn", "nn"),
    Import("torch.nn.parallel", "DistributedDataParallel", "DistributedDataParallel"),
    *(
        Import("torch.utils.data", name, name)
        for name in ("DataLoader", "Dataset", "TensorDataset", "default_collate")
    ),
)


def render(name: str, context: Mapping[str, Any]) -> str:
    """Return a piece of the script from its template."""
    template = _environment().get_template(f"{name}.py.jinja")
    return template.render(fold=fold, **context).strip("\n")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("loopkit.cli.eject"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,
    )


def join(
    header: str, constants: str, carried: list[str], pieces: list[str], imports: Iterable[Import]
) -> str:
    """Return the script.

    Args:
        header: the text of its docstring.
        constants: the assignments at its top.
        carried: the code of the user.
        pieces: the code of the templates.
        imports: the imports that the user's code needs.

    Raises:
        OptionError: the user's code and the templates use one name for two things.
    """
    _check_names(carried, [constants, *pieces], imports)
    body = "\n\n\n".join(piece.strip("\n") for piece in [*_joined(carried), *pieces])
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    wanted = {each.name: each for each in _OFFERED if each.name in used}
    needed = {each for each in imports if each.name not in wanted or _is_dotted(each)}
    chosen = {Import("__future__", "annotations", "annotations"), *wanted.values(), *needed}
    quotes = 'r"""' if "\\" in header else '"""'
    head = f'{quotes}{header}"""\n\n{import_lines(chosen)}\n\n{constants}'
    return f"{head}\n\n\n{body}\n"


def _is_dotted(found: Import) -> bool:
    return found.attribute is None and "." in found.module and found.name != found.module


def _joined(carried: list[str]) -> list[str]:
    """Join neighbouring statements that are no definitions, as a file has them."""
    found: list[str] = []
    simple = False
    for text in carried:
        node = ast.parse(text).body[0]
        now = not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if now and simple:
            found[-1] += f"\n{text}"
        else:
            found.append(text)
        simple = now
    return found


def _check_names(carried: list[str], own: list[str], imports: Iterable[Import]) -> None:
    theirs = {name for text in carried for name in _defined(text)}
    ours = {name for text in own for name in _defined(text)}
    offered = {each.name: each for each in _OFFERED}
    for name in sorted(theirs & (ours | offered.keys())):
        raise refuse(f"{name}, a name of your file", "the script has one of its own. Rename yours")
    for each in imports:
        clash = (
            each.name in offered and not _is_dotted(each) and not _same(each, offered[each.name])
        )
        if clash or each.name in ours:
            raise refuse(
                f"{each.name}, which your file imports from {each.module}",
                "the script means something else by it. Import it under another name",
            )


def _same(one: Import, other: Import) -> bool:
    paths = [
        f"{each.module}.{each.attribute}" if each.attribute else each.module
        for each in (one, other)
    ]
    aliases = {
        "typing.Iterator": "collections.abc.Iterator",
        "typing.Mapping": "collections.abc.Mapping",
    }
    first, second = (aliases.get(path, path) for path in paths)
    return first == second


def _defined(text: str) -> Iterable[str]:
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        for target in getattr(node, "targets", []):
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
