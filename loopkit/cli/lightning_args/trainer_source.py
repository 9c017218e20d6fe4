"""Read what a file says to Lightning, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from yaml import YAMLError

from loopkit.cli.args.yaml_io import load_yaml
from loopkit.cli.lightning_args.call_arguments import Unknown, WrittenCall
from loopkit.errors import OptionError


@dataclass
class Given:
    """What a file says.

    Attributes:
        trainer: the call of the Trainer.
        model: the class of the module, where a YAML names it.
        data: the class of the data module, where a YAML names it.
        seed: what is given to ``seed_everything``; None without it.
        checkpoint: the ``ckpt_path`` of ``fit``; None without it.
        package: the package that has the Trainer, "lightning.pytorch" or "pytorch_lightning".
        notes: what else the file says, each with what to do.
    """

    trainer: WrittenCall
    model: WrittenCall | None = None
    data: WrittenCall | None = None
    seed: Any = None
    checkpoint: Any = None
    package: str = "lightning.pytorch"
    notes: dict[str, str] = field(default_factory=dict)


def holds_trainer(tree: ast.Module) -> bool:
    """Return whether Python source calls Lightning's Trainer."""
    return bool(list(_calls(tree, "Trainer"))) and not list(_calls(tree, "TrainingArguments"))


def read_python(tree: ast.Module) -> Given:
    """Read the one ``Trainer(...)`` of Python source, and the calls around it.

    Raises:
        OptionError: there are several.
    """
    found = list(_calls(tree, "Trainer"))
    if len(found) > 1:
        lines = " and ".join(str(call.lineno) for call in found)
        raise OptionError(f"there is a Trainer(...) in each of the lines {lines}: leave one")
    (call,) = found
    values = _Values(tree)
    given = Given(values.call(call))
    if given.trainer.positional:
        raise OptionError("Trainer takes its arguments by name: Trainer(max_epochs=3)")
    given.seed = values.argument(next(_calls(tree, "seed_everything"), None), "seed", 0)
    given.checkpoint = values.argument(next(_calls(tree, "fit"), None), "ckpt_path", 4)
    modules = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    if any(name.split(".")[0] == "pytorch_lightning" for name in modules):
        given.package = "pytorch_lightning"
    return given


def _calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
            yield node


class _Values:
    """Reads expressions. A name stands for what the file last assigned to it, by one statement."""

    def __init__(self, tree: ast.Module) -> None:
        self._assigned: dict[str, ast.expr | None] = {}
        for node in ast.walk(tree):
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    first = target.id not in self._assigned
                    value = node.value if isinstance(node, ast.Assign) and first else None
                    self._assigned[target.id] = value

    def read(self, node: ast.expr, depth: int = 8) -> Any:
        """Return a plain value, a WrittenCall, a list of both, or an Unknown."""
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError):
            pass
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.read(each, depth) for each in node.elts]
        if isinstance(node, ast.Name) and depth:
            meant = self._assigned.get(node.id)
            return Unknown(node.id) if meant is None else self.read(meant, depth - 1)
        if isinstance(node, ast.Call) and depth:
            return self.call(node, depth - 1)
        return Unknown(ast.unparse(node))

    def call(self, node: ast.Call, depth: int = 8) -> WrittenCall:
        """Return a call with its arguments read."""
        named = {
            keyword.arg or f"**{ast.unparse(keyword.value)}": self.read(keyword.value, depth)
            if keyword.arg
            else Unknown(f"**{ast.unparse(keyword.value)}")
            for keyword in node.keywords
        }
        positional = [self.read(each, depth) for each in node.args]
        name = ast.unparse(node.func).split(".")[-1]
        return WrittenCall(name, "", positional, named, ast.unparse(node))

    def argument(self, node: ast.Call | None, name: str, position: int) -> Any:
        """Return one argument of a call; None without it."""
        if node is None:
            return None
        for keyword in node.keywords:
            if keyword.arg == name:
                return self.read(keyword.value)
        return self.read(node.args[position]) if len(node.args) > position else None


def read_yaml(text: str) -> Given:
    """Read the YAML of a LightningCLI, with or without a subcommand around it.

    Raises:
        OptionError: it is no such YAML.
    """
    try:
        config = load_yaml(text)
    except YAMLError as error:
        raise OptionError(f"it is no YAML: {error}") from error
    notes: dict[str, str] = {}
    if isinstance(config, Mapping) and isinstance(config.get("fit"), Mapping):
        for name in config:
            if name not in ("fit", "seed_everything"):
                notes[str(name)] = "convert-args reads what `fit` is given"
        config = {**config, **config["fit"]}
        notes = {name: reason for name, reason in notes.items() if name not in config["fit"]}
    if not isinstance(config, Mapping) or not isinstance(config.get("trainer"), Mapping):
        raise OptionError("it holds no 'trainer' with arguments by name, as LightningCLI writes it")
    given = Given(
        WrittenCall("Trainer", "", (), {str(n): _read(v) for n, v in config["trainer"].items()})
    )
    seed = config.get("seed_everything")
    given.seed = None if isinstance(seed, bool) else seed
    given.checkpoint, given.notes = config.get("ckpt_path"), notes
    for name in ("model", "data"):
        value = _read(config.get(name))
        if isinstance(value, WrittenCall):
            setattr(given, name, value)
        elif value:
            notes[name] = "its class is in your LightningCLI: give it here, with these arguments"
    for name in ("optimizer", "lr_scheduler"):
        value = _read(config.get(name))
        if isinstance(value, WrittenCall):
            notes[name] = f"return {_source(value)} from configure_optimizers of the module"
        elif value:
            notes[name] = "return it from configure_optimizers of the module"
    known = (
        "fit",
        "trainer",
        "seed_everything",
        "ckpt_path",
        "model",
        "data",
        "optimizer",
        "lr_scheduler",
    )
    for name, value in config.items():
        if name not in known and value not in (None, False, {}, []):
            notes.setdefault(str(name), "no argument of Trainer: give it in your script")
    return given


def _source(call: WrittenCall) -> str:
    first = "optimizer" if "sched" in call.module else "self.parameters()"
    shown = ", ".join([first, *(f"{name}={value!r}" for name, value in call.named.items())])
    return f"{call.module}.{call.name}({shown})"


def _read(value: Any) -> Any:
    """Return a value of YAML, with a WrittenCall for each mapping that has a ``class_path``."""
    if isinstance(value, list):
        return [_read(each) for each in value]
    if not isinstance(value, Mapping) or "class_path" not in value:
        return value
    module, _, name = str(value["class_path"]).rpartition(".")
    named = {str(key): _read(part) for key, part in (value.get("init_args") or {}).items()}
    named.update(value.get("dict_kwargs") or {})
    return WrittenCall(name, module, (), named)
