"""TARGET: ``path/to/file.py``, ``path/to/file.py:Class`` or ``package.module:Class``."""

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

FORMS = "TARGET is path/to/file.py, path/to/file.py:Class or package.module:Class"


def find_task(target: str) -> type[Task]:
    """Import the Task class that ``target`` names.

    Raises:
        OptionError: there is no such file, module or class, or several classes are possible.
        Exception: an error of the imported code.
    """
    source, class_name = _split(target)
    is_file = source.endswith(".py") or os.sep in source or "/" in source
    module = _import_file(source) if is_file else _import_module(source)
    if not class_name:
        return _only_task(module, source)
    found = getattr(module, class_name, None)
    tasks = [each.__name__ for each in _tasks(module)]
    listed = f"Tasks there: {', '.join(tasks)}" if tasks else "It defines no Task"
    if found is None:
        raise OptionError(f"{source} has no {class_name!r}.{nearest(class_name, tasks)} {listed}")
    if isinstance(found, type) and is_lightning(found):
        return _wrapped(found, module)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise OptionError(f"{target} is not a Task: derive the class from loopkit.Task. {listed}")
    return found


def _split(target: str) -> tuple[str, str]:
    source, colon, name = target.rpartition(":")
    return (source, name) if colon and name.isidentifier() else (target.removesuffix(":"), "")


def _import_file(source: str) -> ModuleType:
    """Import a file as ``python file.py`` finds it: its directory comes first on ``sys.path``.

    The module has the file's own name, so that workers can import the classes they unpickle.
    """
    path = Path(source).resolve()
    if not path.is_file():
        files = path.parent.glob("*.py") if path.parent.is_dir() else []
        hint = nearest(source, [str(Path(source).with_name(file.name)) for file in files])
        raise OptionError(f"there is no file {source}.{hint}")
    name = path.stem
    _put_first_on_path(str(path.parent))
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) and Path(str(loaded.__file__)).resolve() == path:
            return loaded
        raise OptionError(
            f"{source} has the name of the module {name!r}, which is in use already: "
            "rename the file"
        )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{source} is not a Python file: {FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    _put_first_on_path(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module exists, and a module that it imports is missing
        hint = f" Did you mean '{name}.py'?" if Path(f"{name}.py").is_file() else ""
        raise OptionError(f"there is no module {name!r}.{hint} {FORMS}") from error


def _put_first_on_path(directory: str) -> None:
    if directory not in sys.path:
        sys.path.insert(0, directory)


def _tasks(module: ModuleType) -> list[type[Task]]:
    """Return the Task classes that ``module`` itself defines, in the order of the file."""
    found = [
        value
        for value in dict.fromkeys(filter(inspect.isclass, vars(module).values()))
        if issubclass(value, Task) and value.__module__ == module.__name__
    ]
    return [value for value in found if not inspect.isabstract(value)]


def _only_task(module: ModuleType, source: str) -> type[Task]:
    tasks: list[type] = [*_tasks(module)] or _own(module, "LightningModule")
    if len(tasks) == 1:
        return tasks[0] if issubclass(tasks[0], Task) else _wrapped(tasks[0], module)
    if not tasks:
        raise OptionError(f"{source} defines no Task: derive a class from loopkit.Task")
    names = ", ".join(f"{source}:{each.__name__}" for each in tasks)
    raise OptionError(f"{source} defines {len(tasks)} tasks: say which one, {names}")


def is_lightning(found: type, kind: str = "LightningModule") -> bool:
    """Return whether a class is derived from a class of Lightning's, which need not be installed."""
    packages = ("lightning", "pytorch_lightning")
    return any(
        each.__name__ == kind and each.__module__.partition(".")[0] in packages
        for each in found.__mro__
    )


def _own(module: ModuleType, kind: str) -> list[type]:
    """Return the classes of Lightning's ``kind`` that ``module`` itself defines."""
    classes = dict.fromkeys(filter(inspect.isclass, vars(module).values()))
    return [c for c in classes if c.__module__ == module.__name__ and is_lightning(c, kind)]


def _wrapped(found: type, module: ModuleType) -> type[Task]:
    """Return a LightningModule's class as a task, with the data module of its file if it has one.

    Raises:
        OptionError: the file defines several data modules.
    """
    data = _own(module, "LightningDataModule")
    if len(data) > 1:
        raise OptionError(
            f"{module.__name__} defines {len(data)} data modules, {', '.join(d.__name__ for d in data)}: "
            "write a Task that says which, class T(LightningTask) with super().__init__(module, data)"
        )
    from loopkit.interop.lightning.wrapped import as_task

    return as_task(found, data[0] if data else None)
