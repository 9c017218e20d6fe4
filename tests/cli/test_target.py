"""TARGET: files and modules, with the class or without."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from loopkit.cli.args.target import find_task
from loopkit.errors import OptionError

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(TASKS)


def test_a_file_with_one_task_needs_no_class():
    assert find_task("shapes.py").__name__ == "Points"


def test_a_file_with_several_tasks_lists_them():
    with pytest.raises(
        OptionError, match=r"defines 2 tasks: say which one, several\.py:Wide, several\.py:Narrow"
    ):
        find_task("several.py")


def test_a_class_of_a_file():
    assert find_task(f"{TASKS}/several.py:Narrow").__name__ == "Narrow"


def test_a_class_of_a_module_in_the_working_directory():
    assert find_task("shapes:Points").__name__ == "Points"


def test_a_class_of_a_package(tmp_path, monkeypatch):
    package = tmp_path / "parts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.py").write_text("from .base import Task\nclass Inner(Task): pass\n")
    (package / "base.py").write_text("from loopkit import Task\n")
    monkeypatch.chdir(tmp_path)
    assert find_task("parts.model:Inner").__module__ == "parts.model"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("shape.py", r"there is no file shape.py. Did you mean 'shapes.py'\?"),
        (
            "shapes.py:Point",
            r"shapes.py has no 'Point'. Did you mean 'Points'\? Tasks there: Points",
        ),
        (
            "shapes.py:Shout",
            r"shapes.py:Shout is not a Task: derive the class from loopkit.Task. Tasks there: Points",
        ),
        ("shapes.py:points", "is not a Task"),
        ("shappes:Points", "there is no module 'shappes'"),
        ("shapes_:Points", "there is no module"),
        ("json:JSONEncoder", "is not a Task"),
        ("json", "json defines no Task"),
    ],
)
def test_what_is_not_there_is_named(target, says):
    with pytest.raises(OptionError, match=says):
        find_task(target)


def test_a_module_that_is_missing_within_the_file_is_not_mistaken_for_the_target(
    tmp_path, monkeypatch
):
    (tmp_path / "needs.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        find_task("needs.py")
    assert "needs" not in sys.modules


def test_a_file_does_not_take_the_place_of_a_module_in_use(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("")
    with pytest.raises(
        OptionError, match=r"json.py has the name of the module 'json', which is in use"
    ):
        find_task(f"{tmp_path}/json.py")


def test_another_process_can_unpickle_the_classes_of_a_file(tmp_path):
    find_task("shapes.py")
    data = pickle.dumps(sys.modules["shapes"].Shout("there"))
    code = f"import sys, pickle; sys.path[:] = {sys.path!r}; print(pickle.loads({data!r}).word)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "there\n"
    )
