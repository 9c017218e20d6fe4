"""Values of options: what each type accepts, typed and in a config, and what is refused."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypedDict

import pytest
import torch

from loopkit.cli.args.parsing import Call, Refused, build, parse, to_plain
from loopkit.cli.args.tokens import Text
from loopkit.cli.args.yaml_io import dump_yaml, load_yaml


class Colour(enum.Enum):
    red = 1
    blue = 2


class Animal:
    def __init__(self, name: str, legs: int = 4):
        self.name, self.legs = name, legs


class Bird(Animal):
    def __init__(self, friend: Animal | None = None, **rest):
        super().__init__(legs=2, **rest)
        self.friend = friend


class Named(TypedDict):
    name: str


class Sized(Protocol):
    def size(self) -> int: ...


@dataclass
class Size:
    width: int = 3
    ratio: float | None = None


def one(hint, value):
    found = build(parse(hint, value, ("option",)))
    return found, type(found)


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "5", 5),
        (int, "-1", -1),
        (float, "5", 5.0),
        (float, "1e-3", 0.001),
        (float, "-.inf", float("-inf")),
        (bool, "yes", True),
        (bool, "False", False),
        (str, "5", "5"),
        (str, "null", "null"),
        (Path, "a/b", Path("a/b")),
        (str | int, "5", 5),
        (str | int, "5 steps", "5 steps"),
        (int | float, "5", 5),
        (int | float, "0.5", 0.5),
        (int | None, "null", None),
        (str | Path | None, "5", "5"),
        (Literal["a", 1], "1", 1),
        (Literal["raise", "skip"] | None, "skip", "skip"),
        (Colour, "blue", Colour.blue),
        (list[int], "[1, 2]", [1, 2]),
        (Sequence[str | int], "[a, 1]", ["a", 1]),
        (str | Sequence[str], "[a, b]", ["a", "b"]),
        (tuple[int, float], "[1, 2]", (1, 2.0)),
        (tuple[float, ...], "[1, 2, 3]", (1.0, 2.0, 3.0)),
        (set[int], "[1, 1]", {1}),
        (dict[str, float], "{a: 1}", {"a": 1.0}),
        (Mapping[str, Any], '{"a": [1, "b"]}', {"a": [1, "b"]}),
        (torch.dtype, "bfloat16", torch.bfloat16),
        (torch.dtype | None, "torch.float16", torch.float16),
        (type, "torch.nn.ReLU", torch.nn.ReLU),
        (Callable[[torch.Tensor], torch.Tensor], "torch.relu", torch.relu),
        (Annotated[int, "any remark"], "5", 5),
        (Named, "{name: a}", {"name": "a"}),
        (Sized, "[1]", [1]),
        (Any, "5", 5),
        (Any, "[1, a]", [1, "a"]),
        (Any, "word", "word"),
    ],
)
def test_typed_text_has_the_type_of_the_option(hint, text, value):
    assert one(hint, Text(text)) == (value, type(value))


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (str, "5"),
        (str | int, "5"),
        (str | None, "null"),
        (float | str, "1e-3"),
        (Any, "5"),
        (bool | str, "yes"),
    ],
)
def test_a_string_in_a_config_stays_one(hint, value):
    assert one(hint, value) == (value, str)
    assert one(hint, load_yaml(dump_yaml([to_plain(value)]))[0]) == (value, str)


@pytest.mark.parametrize(
    ("hint", "value", "says"),
    [
        (int, "8.5", "option: '8.5' is not accepted: give a whole number."),
        (int, "true", "'true' is not accepted: give a whole number."),
        (bool, "1", "'1' is not accepted: give true or false."),
        (float, "null", "'null' is not accepted: give a number."),
        (int | float | None, "x", "'x' is not accepted: give a number or null."),
        (Literal["raise", "skip"], "rase", "give 'raise' or 'skip'. Did you mean 'raise'?"),
        (Literal["raise", "skip"], "stop", "'stop' is not accepted: give 'raise' or 'skip'."),
        (Colour, "green", "'green' is not accepted: give 'red' or 'blue'."),
        (list[int], "[1, x]", "'x' is not accepted: give a whole number."),
        (str | list[int], "[1, x]", "'x' is not accepted: give a whole number."),
        (list[int], "1", "'1' is not a list: give --option '[1]', or --option+='1' to add to it"),
        (list[int], "{a: 1}", "'{a: 1}' is not a list"),
        (tuple[int, int], "[1]", "[1] is not accepted: give a list of 2."),
        (dict[str, int], "{a: x}", "option.a: 'x' is not accepted: give a whole number."),
        (dict[str, int], "[1]", "'[1]' is not accepted: give dict[str, int]."),
        (torch.dtype, "float17", "give a dtype of torch"),
        (type, "torch.nn.RelU", "module 'torch.nn' has no attribute 'RelU'. Did you mean 'ReLU'?"),
        (type, "nowhere.Class", "nowhere.Class cannot be imported: there is no module 'nowhere'"),
        (Size, "5", "'5' is not accepted: give Size."),
        (
            Size | None,
            "{width: wide}",
            "option.width: 'wide' is not accepted: give a whole number.",
        ),
        (Size | bool, "{widht: 1}", "Size has no option 'widht'. Did you mean 'width'?"),
        (Animal, "Bird(nme='a')", "Bird has no option 'nme'. Did you mean 'name'?"),
        (Animal, "Animal", "Animal needs name (str)"),
        (Animal, "Animal('a', 2, 3)", "Animal takes 2 arguments at most"),
        (Animal, "Brid", "there is no class 'Brid'. Did you mean 'Bird'?"),
        (Animal, "{legs: 3}", "option: legs: give the name of the class first"),
        (Animal, "pathlib.Path", "pathlib.Path is not derived from Animal"),
        (
            Animal | None,
            "Bird(name='a', friend=Animal('a', legs=many))",
            "option.friend.legs: 'many' is not accepted",
        ),
    ],
)
def test_what_is_not_accepted_is_refused_with_what_is(hint, value, says):
    with pytest.raises(Refused) as caught:
        parse(hint, Text(value), ("option",))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        Text("Bird(name='a', friend=Animal('b', 3))"),
        Text("Bird(name=a, friend=Animal(b, legs=3))"),
        Text(f"{__name__}.Bird(name='a', friend={__name__}.Animal('b', 3))"),
        Text(
            "{class_path: Bird, init_args: {name: a, friend: {class_path: Animal, init_args: {name: b, legs: 3}}}}"
        ),
        "Bird(name='a', friend=Animal('b', 3))",
        {"class_path": "Bird", "init_args": {"name": "a", "friend": "Animal('b', 3)"}},
    ],
)
def test_an_object_is_given_as_in_python_or_as_a_class_path(value):
    found, kind = one(Animal | None, value)
    assert kind is Bird
    assert (found.name, found.legs, found.friend.name, found.friend.legs) == ("a", 2, "b", 3)


def test_an_argument_keeps_the_text_that_was_typed():
    assert one(Animal, Text("Animal(max-autotune)"))[0].name == "max-autotune"


def test_settings_are_their_fields_and_objects_have_a_class_path_in_a_config():
    settings = parse(Size | bool, Text("Size(width=4)"), ("option",))
    assert to_plain(settings) == {"width": 4, "ratio": None}
    assert build(settings) == Size(4)
    bird = parse(Animal, Text("Bird(name='a')"), ("option",))
    assert isinstance(bird, Call)
    assert to_plain(bird) == {
        "class_path": f"{__name__}.Bird",
        "init_args": {"friend": None, "name": "a", "legs": 4},
    }


def test_numbers_of_a_config_are_numbers_and_dates_are_text():
    text = "[1e-3, 1.5, .5, -2E+4, .inf, 1_000, 2024-01-02, '1e-3', on]"
    values = [0.001, 1.5, 0.5, -20000.0, float("inf"), 1000, "2024-01-02", "1e-3", True]
    assert load_yaml(text) == values
    assert load_yaml(dump_yaml(values)) == values
