"""An error of the set-up is reported and closes what was opened, as an error of a step does."""

from __future__ import annotations

from typing import Any

import pytest

from loopkit import Hook, SingleDevice
from loopkit.errors import OptionError, RunDirError
from tests.support import Tiny, quiet


class Told(Hook):
    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def on_error(self, run: Any, exception: BaseException) -> None:
        self.errors.append(exception)


class Closes(SingleDevice):
    """Notes how it is torn down."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.torn_down: list[bool] = []

    def teardown(self, failed: bool = False) -> None:
        self.torn_down.append(failed)
        super().teardown(failed)


class NoDevice(Closes):
    def setup_environment(self, *args: Any) -> None:
        raise OSError("no device")


def raising(method: str) -> Tiny:
    def fail(*args: Any) -> Any:
        raise ZeroDivisionError(method)

    task = Tiny()
    setattr(task, method, fail)
    return task


@pytest.mark.parametrize("method", ["optimizers", "train_data", "eval_data", "configure_model"])
def test_an_error_of_the_tasks_own_set_up_is_reported_and_closes_the_strategy(method):
    told, strategy = Told(), Closes()
    with pytest.raises(ZeroDivisionError, match=method):
        quiet(hooks=[told], strategy=strategy).run(raising(method))
    assert [str(error) for error in told.errors] == [method]
    assert strategy.torn_down == [True]


def test_an_error_of_the_strategy_is_reported():
    told, strategy = Told(), NoDevice()
    with pytest.raises(OSError, match="no device"):
        quiet(hooks=[told], strategy=strategy).run(Tiny())
    assert len(told.errors) == 1
    assert strategy.torn_down == [True]


def test_an_error_of_the_options_that_shows_in_set_up_is_reported():
    told = Told()
    with pytest.raises(OptionError, match="global_batch_size"):
        quiet(hooks=[told], global_batch_size=7, batch_size=4).run(Tiny())
    assert len(told.errors) == 1


def test_a_run_directory_in_use_is_reported_and_stays_locked(tmp_path):
    told, seen = Told(), []

    class Second(Hook):
        def on_fit_start(self, run: Any) -> None:
            with pytest.raises(RunDirError):
                quiet(hooks=[told], run_dir=tmp_path).run(Tiny())
            seen.append(len(told.errors))

    quiet(hooks=[Second()], run_dir=tmp_path, steps=1).run(Tiny())
    assert seen == [1]
    quiet(run_dir=tmp_path, steps=1).run(Tiny())  # released at the end


def test_the_task_itself_hears_of_an_error_in_set_up():
    heard = []

    class Listens(Tiny):
        def on_error(self, run: Any, exception: BaseException) -> None:
            heard.append(type(exception).__name__)

        def optimizers(self) -> Any:
            raise KeyError("lr")

    with pytest.raises(KeyError):
        quiet().run(Listens())
    assert heard == ["KeyError"]


def test_an_error_of_inference_set_up_is_reported_and_closes_the_strategy():
    told, strategy = Told(), Closes()
    fit = quiet(hooks=[told], strategy=strategy)
    with pytest.raises(ZeroDivisionError):
        fit.evaluate(raising("eval_data"))
    with pytest.raises(ZeroDivisionError):
        fit.predict(raising("predict_data"))
    assert len(told.errors) == 2
    assert strategy.torn_down == [True, True]
