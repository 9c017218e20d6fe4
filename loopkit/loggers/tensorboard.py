"""TensorBoardLogger: event files, made of tensorboardX's messages in TensorBoard's record format.

tensorboardX's own writer gives events to a thread through a queue of ten. If the disk is full, that
thread ends, and the full queue blocks training for ever. Records that are written here raise an
ordinary exception instead, take one event per row instead of one per scalar, and show values at
once.
"""

from __future__ import annotations

import socket
import struct
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.record_writer import masked_crc32c

from loopkit.errors import LoopkitError, LoopkitWarning
from loopkit.keywords import checks_keywords
from loopkit.loggers.base import Logger
from loopkit.loggers.media import KINDS, Media, png, wav
from loopkit.loggers.serialize import flatten, to_array, to_float
from loopkit.loggers.summary_writer import summary_writer

_BINS = 30
_PIXELS = 256
_MOST_CELLS = 1024


@checks_keywords
class TensorBoardLogger(Logger):
    """Write scalars, hyperparameters, media, 1-D arrays as histograms and 2-D arrays as images.

    A resumed run writes a new file. Its first record makes TensorBoard forget the later steps of
    earlier files. Hyperparameters appear in TensorBoard's HPARAMS tab, without a sub-run.

    Args:
        dir: the folder of the event files, absolute or within the run directory.
    """

    name = "tensorboard"
    media = KINDS

    def __init__(self, dir: str | Path = "tensorboard") -> None:
        self._given = Path(dir)
        self._file: IO[bytes] | None = None
        self._status = "finished"
        self._reported: set[str] = set()
        self._experiment: Any = None
        self._failure: OSError | None = None

    @property
    def experiment(self) -> Any:
        """tensorboardX's SummaryWriter on the event file of this run, for what loopkit does not log.

        Give each call its step: ``add_pr_curve(tag, labels, scores, global_step=step)``.

        Raises:
            LoopkitError: no run is open.
        """
        if self._file is None:
            raise LoopkitError("TensorBoardLogger.experiment exists only during a run")
        if self._experiment is None:
            self._experiment = summary_writer(self.path.parent, self._write_or_note)
        return self._experiment

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Start a new event file. Steps after ``step`` in earlier files become void; at 0, all."""
        self.close()
        folder = Path(run_dir) / self._given
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [_stamp(path) for path in folder.glob("events.out.tfevents.*")]
        # TensorBoard reads the files of a folder in the order of their names.
        stamp = max([int(time.time()), *(other + 1 for other in earlier)])
        self.path = folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}"
        self._file = open(self.path, "xb")  # noqa: SIM115 - closed by close()
        self._write(Event(file_version="brain.Event:2"))
        if step or earlier:
            from_step = step + 1 if step else 0
            self._write(Event(step=from_step, session_log=SessionLog(status=SessionLog.START)))
        self._write_hparams("session_start_info", session_start_info=_started(hparams))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one event with a scalar for each value."""
        scalars = [
            Summary.Value(tag=_tag(name), simple_value=to_float(value))
            for name, value in values.items()
        ]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Write 1-D arrays as histograms and 2-D arrays as images; report all others once."""
        found = []
        for name, value in arrays.items():
            array = to_array(value)
            if array is None or array.size == 0:
                continue
            if array.ndim == 1 and np.isfinite(array).any():
                found.append(Summary.Value(tag=_tag(name), histo=_histogram(array)))
            elif array.ndim == 2:
                found.append(Summary.Value(tag=_tag(name), image=_image(array)))
            elif array.ndim != 1 and name not in self._reported:
                self._reported.add(name)
                warnings.warn(
                    f"TensorBoardLogger draws arrays of one and two dimensions, and {name!r} has the "
                    f"shape {array.shape}: it is not logged there. run.log_image logs an image",
                    LoopkitWarning,
                    stacklevel=2,
                )
        if found:
            self._write(Event(step=step, summary=Summary(value=found)))

    def log_media(self, media: Media, step: int) -> None:
        """Write an image, a text, a histogram or audio."""
        tag, value = _tag(media.name), media.value
        if media.kind == "text":
            plugin = SummaryMetadata.PluginData(plugin_name="text")
            tensor = TensorProto(dtype="DT_STRING", string_val=[_text(value).encode("utf-8")])
            made = Summary.Value(
                tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor
            )
        elif media.kind == "image":
            made = Summary.Value(tag=tag, image=_encoded(value))
        elif media.kind == "audio":
            sound = Summary.Audio(
                sample_rate=media.sample_rate,
                num_channels=value.shape[1],
                length_frames=value.shape[0],
                encoded_audio_string=wav(media),
                content_type="audio/wav",
            )
            made = Summary.Value(tag=tag, audio=sound)
        elif value.size:
            made = Summary.Value(tag=tag, histo=_histogram(value))
        else:
            return
        self._write(Event(step=step, summary=Summary(value=[made])))

    def files(self) -> list[Path]:
        """Return the event file of this session."""
        return [self.path]

    def end(self, status: str) -> None:
        """Note how the run ended; ``close`` writes it."""
        self._status = status

    def close(self) -> None:
        """Mark the session as ended and close the file."""
        if self._file is not None:
            how = "STATUS_FAILURE" if self._status == "failed" else "STATUS_SUCCESS"
            end = SessionEndInfo(status=Status.Value(how), end_time_secs=time.time())
            self._write_hparams("session_end_info", session_end_info=end)
            self._file.close()
            self._file = self._experiment = None

    def _write_hparams(self, name: str, **content: Any) -> None:
        data = HParamsPluginData(version=0, **content).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data)
        value = Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=plugin))
        self._write(Event(summary=Summary(value=[value])))

    def _write_or_note(self, event: Any) -> None:
        """Write an event of ``experiment``. An error drops this logger, and not the user's hook."""
        try:
            self._write(event)
        except OSError as error:
            self._failure = error

    def _write(self, event: Any) -> None:
        """Write one record: length, its checksum, the event, its checksum."""
        if self._failure is not None:
            raise self._failure
        assert self._file is not None
        event.wall_time = event.wall_time or time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + checks[0] + data + checks[1])
        self._file.flush()


def _stamp(path: Path) -> int:
    to_float = path.name.split(".")[3]
    return int(to_float) if to_float.isdigit() else 0


def _tag(name: str) -> str:
    # Any text is a tag. TensorBoard groups by the part before a slash, so none may lead.
    return _text(name).lstrip("/") or "unnamed"


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _started(hparams: Mapping[str, Any]) -> Any:
    info = SessionStartInfo(start_time_secs=time.time())
    for name, value in flatten(hparams).items():
        slot = info.hparams[_text(name)]
        if isinstance(value, bool):
            slot.bool_value = value
        elif isinstance(value, str):
            slot.string_value = _text(value)
        else:
            slot.number_value = to_float(value)
    return info


def _histogram(array: Any) -> Any:
    values = np.clip(array[np.isfinite(array)], -1e100, 1e100)
    counts, edges = np.histogram(values, bins=_BINS)
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=values.dot(values),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _image(array: Any) -> Any:
    """Draw a matrix: its least value white, its greatest dark blue, values not finite grey."""
    array = array[tuple(slice(None, None, -(-length // _MOST_CELLS)) for length in array.shape)]
    finite = np.isfinite(array)
    known = np.clip(array[finite], -1e100, 1e100)
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    share = (np.clip(np.where(finite, array, low), low, high) - low) / ((high - low) or 1.0)
    white, blue = np.array([255.0] * 3), np.array([8.0, 48.0, 107.0])
    grey = np.array([160.0] * 3)
    colours = np.where(finite[..., None], white + share[..., None] * (blue - white), grey)
    times = max(1, _PIXELS // max(array.shape))
    return _encoded(colours.round().astype(np.uint8).repeat(times, axis=0).repeat(times, axis=1))


def _encoded(pixels: Any) -> Any:
    height, width, channels = pixels.shape
    return Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=png(pixels)
    )
