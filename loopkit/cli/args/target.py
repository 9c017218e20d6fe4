"""TARGET: ``path/to/file.py``, ``path/to/file.py:Class`` or ``package.module:Class`` becomes a Task
class.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType

from loopkit.errors import OptionError, nearest
from loopkit.task import Task


def find_task(target: str) -> type[Task]:
    """Import what ``target`` names.

    Raises:
        OptionError: there is no such file, module or class, or it is not clear which class is
            meant.
        Exception: whatever the imported code raises.
    """
    place, class_name = _split(target)
    is_file = place.endswith(".py") or os.sep in place or "/" in place
    module = _import_file(place) if is_file else _import_module(place)
    if not class_name:
        return _only_task(module, place)
    found = getattr(module, class_name, None)
    if found is None:
        tasks = [each.__name__ for each in _tasks(module)]
        raise OptionError(
            f"{place} has no {class_name!r}.{nearest(class_name, tasks)} {_listed(tasks)}"
        )
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise OptionError(
            f"{target} is not a Task: derive the class from loopkit.Task. "
            f"{_listed([each.__name__ for each in _tasks(module)])}"
        )
    return found


def _split(target: str) -> tuple[str, str]:
    place, colon, name = target.rpartition(":")
    return (place, name) if colon and name.isidentifier() else (target.removesuffix(":"), "")


def _import_file(place: str) -> ModuleType:
    """Run a file as ``python file.py`` would find it: its folder comes first on ``sys.path``.

    The module is known under the file's own name, so that data workers can import the classes they
    unpickle.
    """
    path = Path(place).resolve()
    if not path.is_file():
        folder = path.parent
        files = (
            [str(Path(place).with_name(p.name)) for p in folder.glob("*.py")]
            if folder.is_dir()
            else []
        )
        raise OptionError(f"there is no file {place}.{nearest(place, files)}")
    name = path.stem
    _first_on_path(str(path.parent))
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) and Path(str(loaded.__file__)).resolve() == path:
            return loaded
        raise OptionError(
            f"{place} has the name of the module {name!r}, which is in use already: rename the file"
        )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OptionError(
            f"{place} is not a Python file: TARGET is path/to/file.py or package.module:Class"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    _first_on_path(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # found, and what it imports itself is missing
        hint = f" Did you mean '{name}.py'?" if Path(f"{name}.py").is_file() else ""
        raise OptionError(
            f"there is no module {name!r}.{hint} TARGET is path/to/file.py, path/to/file.py:Class "
            f"or "
            "package.module:Class"
        ) from error


def _first_on_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _tasks(module: ModuleType) -> list[type[Task]]:
    """The Task classes that ``module`` defines itself, in the order they are written."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task)
    ]
    own = [value for value in dict.fromkeys(found) if value.__module__ == module.__name__]
    return [value for value in own if not inspect.isabstract(value)]


def _only_task(module: ModuleType, place: str) -> type[Task]:
    tasks = _tasks(module)
    if len(tasks) == 1:
        return tasks[0]
    if not tasks:
        raise OptionError(f"{place} defines no Task: derive a class from loopkit.Task")
    names = ", ".join(f"{place}:{each.__name__}" for each in tasks)
    raise OptionError(f"{place} defines {len(tasks)} tasks: say which one, {names}")


def _listed(tasks: list[str]) -> str:
    return f"Tasks there: {', '.join(tasks)}" if tasks else "It defines no Task"
