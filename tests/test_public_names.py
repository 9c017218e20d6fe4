"""The package's public names: each one importable, none of them loaded before it is asked for."""

import inspect
import pydoc
import subprocess
import sys

import pytest

import loopkit


@pytest.mark.parametrize("name", loopkit.__all__)
def test_every_public_name_is_there(name):
    assert getattr(loopkit, name).__name__ == name
    assert name in dir(loopkit)


def test_the_table_and_the_list_of_public_names_agree():
    assert sorted(name for names in loopkit._HOMES.values() for name in names) == sorted(
        loopkit.__all__
    )


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Fitt'"):
        loopkit.Fitt  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, loopkit; assert 'torch' not in sys.modules; loopkit.optim.AdamW; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_shows_what_fit_takes():
    shown = pydoc.plain(pydoc.render_doc(loopkit.Fit))
    assert "strategy: 'StrategyLike' = 'auto'" in shown
    assert "accumulate: micro-batches per optimizer step." in shown
    assert list(inspect.signature(loopkit.Fit).parameters)[:3] == ["strategy", "devices", "nodes"]
