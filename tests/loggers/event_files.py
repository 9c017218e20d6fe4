"""Event files read back the way TensorBoard reads them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


def events_of(path: Path) -> list[Any]:
    """Every event of one file, checksums verified."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        assert struct.unpack_from("<I", data, at + 8)[0] == masked_crc32c(data[at : at + 8])
        body = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked_crc32c(body)
        found.append(Event.FromString(body))
        at += 16 + length
    return found


def values_of(folder: Path) -> list[tuple[int, Any]]:
    """(step, value) over the files of a folder in the order of their names, restarts honoured."""
    kept: list[tuple[int, Any]] = []
    for path in sorted(folder.iterdir()):
        for event in events_of(path):
            if event.session_log.status == SessionLog.START:
                kept = [
                    (step, value)
                    for step, value in kept
                    if step < event.step or value.HasField("metadata")
                ]
            kept += [(event.step, value) for value in event.summary.value]
    return kept


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of each scalar."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, value in values_of(folder):
        if value.WhichOneof("value") == "simple_value":
            found.setdefault(value.tag, []).append((step, value.simple_value))
    return found
