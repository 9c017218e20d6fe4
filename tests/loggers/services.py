"""What the services wrote on this machine, read back with nothing of loopkit."""

from __future__ import annotations

import json
import sqlite3
import struct
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Found:
    """Of one run: points by name, hyperparameters, the ids and names of the runs seen, how they
    ended.
    """

    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    hparams: dict[str, Any] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    arrays: dict[tuple[str, int], Any] = field(default_factory=dict)
    status: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, step: int, value: Any) -> None:
        if isinstance(value, (int, float, str)):
            self.points.setdefault(name, []).append((step, float(value)))
        else:
            self.arrays[name, step] = value


def of_wandb(run_dir: Path) -> Found:
    found = Found()
    for folder in sorted(run_dir.glob("wandb/offline-run-*")):  # named by the second
        for record in _whole(folder):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = [
                    (
                        (item.key,) if item.key else tuple(item.nested_key),
                        json.loads(item.value_json),
                    )
                    for item in record.history.item
                ]
                step = dict(items).get(("step",), -1)
                for (name, *part), value in items:
                    if part:
                        found.arrays.setdefault((name, step), {})[part[0]] = value
                    elif not name.startswith("_") and name != "step":
                        found.add(name, step, value)
            elif kind == "run":
                found.ids.add(record.run.run_id)
                found.names.add(record.run.display_name)
                found.about |= {
                    "project": record.run.project,
                    "tags": list(record.run.tags),
                    "group": record.run.run_group,
                }
                found.hparams |= {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            elif kind == "summary":
                for item in record.summary.update:
                    if (item.key or item.nested_key[0]) == "status":
                        found.status = json.loads(item.value_json)
            elif kind == "exit":
                found.about["exit"] = record.exit.exit_code
    return found


def _whole(folder: Path) -> list[Any]:
    """The records of a run that is over; W&B's own process writes the last of them after ``finish``
    has returned.
    """
    for _ in range(100):
        records = [record for path in folder.glob("*.wandb") for record in _wandb_records(path)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"no end in {folder}")


def _wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log, in blocks of 32 KiB, after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + length > len(data):  # not yet written
            return
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(part)
            part = b""


def of_mlflow(run_dir: Path) -> Found:
    """A folder of MLflow: a line "time value step" for each point."""
    found = Found()
    for run in (run_dir / "mlruns").glob("*/*/metrics"):
        home = run.parent
        about = dict(line.split(": ", 1) for line in (home / "meta.yaml").read_text().splitlines())
        found.ids.add(home.name)
        found.names.add(about["run_name"].strip("'"))
        found.status = {"2": "FAILED?", "3": "FINISHED", "4": "FAILED", "5": "KILLED"}.get(
            about["status"], about["status"]
        )
        for path in filter(Path.is_file, run.rglob("*")):
            for line in path.read_text().splitlines():
                _, value, step = line.split()
                found.add(str(path.relative_to(run)), int(step), float(value))
        params = home / "params"
        found.hparams |= {
            str(p.relative_to(params)): p.read_text() for p in params.rglob("*") if p.is_file()
        }
        found.about |= {path.name: path.read_text() for path in (home / "tags").iterdir()}
        found.about["project"] = next(
            line for line in (home.parent / "meta.yaml").read_text().splitlines() if "name:" in line
        )[6:]
        for path in (home / "artifacts").rglob("*.json"):
            content = json.loads(path.read_text())
            found.arrays[content["name"], content["step"]] = content.get("values", content)
    return found


def of_comet(run_dir: Path) -> Found:
    found = Found()
    for path in sorted(
        (run_dir / "comet").glob("*/*.zip"), key=lambda path: path.stat().st_mtime_ns
    ):
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("experiment.json"))
            found.ids.add(about["offline_id"])
            found.about |= {"project": about["project_name"], "tags": about["tags"]}
            for line in archive.read("messages.json").decode().splitlines():
                kind, said = (message := json.loads(line))["type"], message["payload"]
                if kind == "metric_msg" and said["metric"]["metricName"] != "process duration":
                    found.add(
                        said["metric"]["metricName"],
                        said["metric"]["step"],
                        said["metric"]["metricValue"],
                    )
                elif kind == "parameter_msg":
                    found.hparams[said["param"]["paramName"]] = said["param"]["paramValue"]
                elif kind == "log_other" and said["key"] == "Name":
                    found.names.add(said["value"])
                elif kind == "log_other" and said["key"] == "status":
                    found.status = said["value"]
                elif kind == "file_upload" and said["additional_params"].get("type") in (
                    "confusion-matrix",
                    "histogram3d",
                ):
                    content = json.loads(archive.read(Path(said["file_path"]).name))
                    found.arrays[
                        content.get("title") or said["additional_params"]["fileName"],
                        said["additional_params"]["step"],
                    ] = content
    return found


def of_clearml(cache: Path, project: str) -> Found:
    found = Found()
    for path in sorted(cache.glob("offline/*.zip")):
        with zipfile.ZipFile(path) as session:
            about = json.loads(session.read("task.json"))
            if about["project_name"] != project:
                continue
            found.ids.add(about["id"])
            found.names.add(about["name"])
            found.about |= {"project": about["project_name"], "tags": about.get("tags")}
            found.hparams |= {
                f"{section}/{name}": each["value"]
                for section, values in about["hyperparams"].items()
                for name, each in values.items()
            }
            for line in session.read("metrics.jsonl").decode().splitlines():
                for event in json.loads(line):
                    name = (
                        event["variant"]
                        if event["variant"] == event["metric"]
                        else f"{event['metric']}/{event['variant']}"
                    )
                    value = (
                        event["value"]
                        if event["type"] == "training_stats_scalar"
                        else json.loads(event.get("plot_str", "{}"))
                    )
                    found.add(name, event["iter"], value)
    return found


def of_trackio(folder: Path, project: str) -> Found:
    found = Found()
    for path in folder.glob(f"{project}.db"):
        with sqlite3.connect(path) as database:
            for run, name, step, values in database.execute(
                "select run_id, run_name, step, metrics from metrics order by id"
            ):
                found.ids.add(run)
                found.names.add(name)
                for key, value in json.loads(values).items():
                    found.add(key, step, value)
            for name, config in database.execute("select run_name, config from configs"):
                found.names.add(name)
                found.hparams |= json.loads(config)
        found.about["project"] = path.stem
    return found
