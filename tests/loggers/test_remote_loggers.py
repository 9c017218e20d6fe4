"""The loggers to services, each with its own package in its offline mode; what it wrote is read
back.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import dying_runs
import pytest
import services
import torch
from dying_runs import Fails
from torchmetrics import Metric

from loopkit import Checkpoint, Fit, Hook
from loopkit.errors import LoopkitError, LoopkitWarning, MissingExtraError, OptionError
from loopkit.loggers.clearml import ClearMLLogger
from loopkit.loggers.comet import CometLogger
from loopkit.loggers.jsonl import read_rows
from loopkit.loggers.mlflow import MLflowLogger
from loopkit.loggers.mlflow import _name as mlflow_name
from loopkit.loggers.registry import check_loggers
from loopkit.loggers.remote import RemoteLogger
from loopkit.loggers.trackio import TrackioLogger
from loopkit.loggers.wandb import WandbLogger

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the services' own code


@pytest.fixture(autouse=True)
def _at_home(tmp_path_factory, monkeypatch):
    """Nothing of a service leaves the folder of the tests, or asks for an account."""
    home = tmp_path_factory.getbasetemp() / "services"
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "COMET_LOGGING_CONSOLE": "ERROR",
        "CLEARML_LOG_LEVEL": "ERROR",
        "COMET_CONFIG": str(home / "comet.config"),
        "HF_HUB_OFFLINE": "1",
        "TRACKIO_DIR": str(home / "trackio"),
        "CLEARML_CACHE_DIR": str(home / "clearml"),
        "COMET_DISABLE_AUTO_LOGGING": "1",
    }.items():
        monkeypatch.setenv(name, value)


SERVICES = {
    "wandb": lambda project: WandbLogger(project=project, name="n", tags=["a"], offline=True),
    "mlflow": lambda project: MLflowLogger(project=project, name="n", tags={"a": "b"}),
    "comet": lambda project: CometLogger(
        project=project, name="n", tags=["a"], offline=True, log_code=False, log_git_metadata=False
    ),
    "trackio": lambda project: TrackioLogger(project=project, name="n", auto_log_cpu=False),
    "clearml": lambda project: ClearMLLogger(project=project, name="n", offline=True),
}


def read(service: str, run_dir: Path, project: str) -> services.Found:
    if service == "trackio":
        return services.of_trackio(Path(sys.modules["trackio"].TRACKIO_DIR), project)
    if service == "clearml":
        from clearml.config import get_cache_dir

        return services.of_clearml(Path(get_cache_dir()), project)
    return getattr(services, f"of_{service}")(run_dir)


class Counts(Metric):
    """A matrix and a vector of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds):
        self.seen += len(preds)

    def compute(self):
        return torch.tensor([[3.0, 1.0], [0.0, 5.0]])


class Line(dying_runs.Line):
    def eval_step(self, batch):
        return {**super().eval_step(batch), "preds": batch[0]}

    def metrics(self):
        return {"confusion": Counts()}


def attempt(logger, run_dir, *hooks, **options):
    torch.manual_seed(0)
    options = {"batch_size": 2, "epochs": 2, "log_every": 1, "eval_every": 5, **options}
    return Fit(
        run_dir=run_dir,
        resume="auto",
        progress=False,
        hooks=hooks,
        loggers=("jsonl", logger),
        checkpoint=Checkpoint(every=4, background=False),
        **options,
    ).run(Line())


def logged(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What the file in the run directory says: the truth."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "time"):
                points.setdefault(name, []).append((row["step"], value))
    return points


def check(found: services.Found, run_dir: Path) -> None:
    for name, points in logged(run_dir).items():
        seen = found.points[name]
        assert [step for step, _ in seen] == [step for step, _ in points], name
        if name not in (
            "eval/runtime",
            "eval/samples_per_second",
        ):  # which an attempt measures again
            assert [value for _, value in seen] == pytest.approx([value for _, value in points]), (
                name
            )
    assert len(found.ids) == 1


@pytest.mark.parametrize("service", SERVICES)
def test_each_step_stands_once_with_a_service_however_often_the_run_dies(service, tmp_path):
    for step in (7, 18):
        with pytest.raises(RuntimeError, match="went down"):
            attempt(SERVICES[service]("dies"), tmp_path / "run", Fails(step))
        ended = int(time.time())
        while service == "wandb" and int(time.time()) == ended:  # it names its folder by the second
            time.sleep(0.01)
    attempt(SERVICES[service]("dies"), tmp_path / "run")
    check(read(service, tmp_path / "run", "dies"), tmp_path / "run")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_gets_the_whole_run(service, tmp_path):
    attempt(SERVICES[service]("whole"), tmp_path / "run", epochs=1)
    found = read(service, tmp_path / "run", "whole")
    check(found, tmp_path / "run")
    assert found.names == {"n"}
    assert found.about["project"] == "whole"
    assert {step for name, step in found.arrays if name == "eval/confusion"} == {5, 10}
    nested = service in ("wandb", "trackio")
    width = found.hparams["hparams"]["width"] if nested else found.hparams["hparams/width"]
    assert int(width) == 1
    if service in ("wandb", "comet"):
        assert (found.status, found.about["tags"]) == ("finished", ["a"])
    if service == "mlflow":
        assert (found.status, found.about["a"]) == ("FINISHED", "b")
        assert found.arrays["eval/confusion", 5] == [[3.0, 1.0], [0.0, 5.0]]


@pytest.mark.parametrize(("service", "status"), [("wandb", "failed"), ("mlflow", "FAILED")])
def test_a_service_learns_that_a_run_failed(service, status, tmp_path):
    with pytest.raises(RuntimeError, match="went down"):
        attempt(SERVICES[service]("fails"), tmp_path / "run", Fails(3))
    found = read(service, tmp_path / "run", "fails")
    assert (found.status, found.about.get("exit", 1)) == (status, 1)


def test_a_run_that_starts_again_is_a_new_one_of_the_service(tmp_path):
    with pytest.raises(RuntimeError, match="went down"):
        attempt(
            SERVICES["mlflow"]("again"), tmp_path / "run", Fails(3)
        )  # before the first checkpoint
    attempt(SERVICES["mlflow"]("again"), tmp_path / "run")
    found = read("mlflow", tmp_path / "run", "again")
    assert len(found.ids) == 2
    assert sorted(step for step, _ in found.points["train/loss"]) == [
        1,
        1,
        2,
        2,
        3,
        3,
        *range(4, 21),
    ]


def test_a_user_reaches_the_services_own_object(tmp_path):
    logger = SERVICES["wandb"]("own")

    class Watch(Hook):
        def on_fit_start(self, run):
            logger.experiment.watch(run.task, log="gradients", log_freq=1)

        def on_step_end(self, run, out):
            logger.experiment.log({"mine": run.progress.step})

    attempt(logger, tmp_path / "run", Watch(), epochs=1)
    found = read("wandb", tmp_path / "run", "own")
    drawn = {name for name, _ in found.arrays if name.startswith("gradients/")}
    # W&B puts "graph_1" before the names of the second model that a process has it watch, and so
    # on.
    assert {name.rpartition("layer")[2] for name in drawn} == {".weight", ".bias"}
    assert len(found.points["mine"]) == 10
    check(found, tmp_path / "run")
    with pytest.raises(LoopkitError, match="exists only during a run"):
        _ = logger.experiment


def test_a_run_of_wandb_that_the_user_opened_is_taken_and_left_open(tmp_path):
    import wandb

    with wandb.init(project="mine", id="mine1", dir=tmp_path, mode="offline") as mine:
        attempt("wandb", tmp_path / "run", epochs=1)
        assert wandb.run is mine
        mine.log({"after": 1.0})
    found = services.of_wandb(tmp_path)
    assert found.ids == {"mine1"}
    assert [step for step, _ in found.points["train/loss"]] == list(range(1, 11))
    assert "after" in found.points


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("train/loss", "train/loss"),
        ("a[0]", "a_0_"),
        ("é🦊", "__"),
        ("/lead//twice/", "lead/twice"),
        ("../x", "__/x"),
        ("", "unnamed"),
        ("n" * 300, "n" * 250),
    ],
)
def test_any_name_is_one_for_mlflow(name, taken, tmp_path):
    assert mlflow_name(name) == taken
    logger = MLflowLogger(project="names")
    logger.open(tmp_path, 0, {"task": "T", name: 1})
    logger.log({name: 10**400}, 1)
    logger.close()
    assert read("mlflow", tmp_path, "names").points == {taken: [(1, float("inf"))]}


class Down(RemoteLogger):
    """A service that does not answer, or fails."""

    name = "down"
    package = "json"

    def __init__(self, fails_in: str, timeout: float = 60.0) -> None:
        super().__init__("p", "n", timeout)
        self.fails_in = fails_in
        self.over = threading.Event()

    def _fail(self, where):
        if where == self.fails_in:
            raise ConnectionError(f"no route to host in {where}")
        if f"{where} hangs" == self.fails_in:
            self.over.wait(30)

    def _start(self, opening):
        self._fail("start")
        return "1"

    def _send(self, rows):
        self._fail("send")

    def _send_array(self, name, array, step):
        return True

    def _stop(self, status):
        self._fail("stop")


@pytest.mark.parametrize("where", ["start", "send", "stop"])
def test_a_service_that_fails_is_reported_once_and_the_run_continues(where, tmp_path):
    with pytest.warns(
        LoopkitWarning, match=f"Down failed in .*ConnectionError: no route to host in {where}"
    ) as told:
        result = attempt(Down(where), tmp_path / "run")
    assert (result.status, result.step, len(told)) == ("finished", 20, 1)


@pytest.mark.parametrize("where", ["start hangs", "send hangs"])
def test_a_service_that_hangs_holds_nothing_up(where, tmp_path):
    logger = Down(where, timeout=0.2)
    began = time.perf_counter()
    with pytest.warns(LoopkitWarning, match="down has not taken everything within 0.2 s"):
        result = attempt(logger, tmp_path / "run")
    logger.over.set()
    assert (result.status, result.step) == ("finished", 20)
    assert time.perf_counter() - began < 15


def test_a_client_that_ends_its_process_ends_its_logger_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Down, "_start", lambda self, opening: sys.exit(3))
    with pytest.warns(LoopkitWarning, match=r"Down failed in .*down gave up: SystemExit\(3\)"):
        assert attempt(Down(""), tmp_path / "run").status == "finished"


def test_a_server_of_mlflow_that_is_down_does_not_hurt(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(LoopkitWarning, match="MLflowLogger failed"):
        result = attempt(MLflowLogger(tracking_uri="http://127.0.0.1:9"), tmp_path / "run")
    assert result.status == "finished"


def test_what_a_service_prints_is_not_on_stdout(tmp_path, capsys):
    attempt(SERVICES["trackio"]("prints"), tmp_path / "run", epochs=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Trackio" in err


def test_names_are_taken_from_the_variable_or_the_run(tmp_path, monkeypatch):
    attempt("mlflow", tmp_path / "line" / "3", epochs=1)
    found = read("mlflow", tmp_path / "line" / "3", "Line")
    assert (found.about["project"], found.names) == ("Line", {"line-3"})
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    attempt("mlflow", tmp_path / "other", epochs=1)
    found = read("mlflow", tmp_path / "other", "theirs")
    assert (found.about["project"], found.names) == ("theirs", {"other"})


@pytest.mark.parametrize("service", SERVICES)
def test_a_missing_package_is_reported_before_anything_starts(service, monkeypatch):
    package = {"comet": "comet_ml"}.get(service, service)
    monkeypatch.setattr("loopkit.loggers.remote.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError,
        match=rf"needs the package '{package}': pip install 'loopkit-torch\[{service}\]'",
    ):
        Fit(loggers=service)


def test_a_service_is_given_once():
    with pytest.raises(OptionError, match=r"two for wandb, .* wandb.json"):
        check_loggers(["wandb", WandbLogger(project="other")])


class Draws(Hook):
    """Logs one value of each kind at step 3."""

    def on_step_end(self, run, out):
        if run.progress.step == 3:
            run.log_image("eval/picture", torch.rand(3, 6, 5))
            run.log_text("said", "some text")
            run.log_histogram("weights", torch.rand(50))
            run.log_audio("sound", torch.rand(2, 100) - 0.5, 8000)


# Of each service, what it keeps of an image, a text, a histogram and audio.
KEPT = {
    "wandb": (
        "media/images/eval/picture_*.png",
        "media/table/said_*.json",
        "media/audio/sound_*.wav",
    ),
    "mlflow": (
        "artifacts/image/eval/picture/00000003.png",
        "artifacts/text/said/00000003.txt",
        "artifacts/histogram/weights/00000003.json",
        "artifacts/audio/sound/00000003.wav",
    ),
}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_takes_images_texts_histograms_and_audio(service, tmp_path):
    logger, project = SERVICES[service](f"media-{service}"), f"media-{service}"
    # A warning of loopkit's that it did not would be an error here, in the service's thread.
    result = attempt(logger, tmp_path / "run", Draws(), epochs=1)
    assert result.status == "finished"
    check(read(service, tmp_path / "run", project), tmp_path / "run")
    files = [str(path) for path in (tmp_path / "run").rglob("*")]
    for pattern in KEPT.get(service, ()):
        assert any(Path(file).match(pattern) for file in files), (pattern, files)
    sent = json.loads((tmp_path / "run" / f"{service}.json").read_text())["last"]
    assert {name: sent[name] for name in ("eval/picture", "said", "weights", "sound")} == {
        "eval/picture": 3,
        "said": 3,
        "weights": 3,
        "sound": 3,
    }
