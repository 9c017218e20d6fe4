"""Media: images, figures, text, histograms and audio, which a run gives to the loggers that take them."""

from __future__ import annotations

import io
import math
import struct
import sys
import wave
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loopkit.errors import OptionError

Kind = Literal["image", "text", "histogram", "audio"]
KINDS: tuple[Kind, ...] = ("image", "text", "histogram", "audio")
_CHANNELS = (1, 3, 4)
_IMAGE = "[C, H, W], [H, W, C] or [H, W] with 1, 3 or 4 channels"


@dataclass(frozen=True)
class Media:
    """One value to log that is no number.

    Attributes:
        kind: "image", "text", "histogram" or "audio".
        name: the full name.
        value: as the user gave it; ``converted`` returns what loggers get.
        sample_rate: samples per second, for audio.

    Raises:
        OptionError: the value has a type or a shape that its kind does not have.
    """

    kind: Kind
    name: str
    value: Any
    sample_rate: int = 0

    def __post_init__(self) -> None:
        shape = getattr(self.value, "shape", None)
        if self.kind == "text":
            if not isinstance(self.value, str):
                raise self._error(f"a {type(self.value).__name__}", "give a string")
        elif (
            self.kind == "image"
            and shape is None
            and not hasattr(self.value, "__array_interface__")
        ):
            raise self._error(
                f"a {type(self.value).__name__}",
                f"give a tensor or an array {_IMAGE}, or a PIL image",
            )
        elif self.kind == "image" and shape is not None and _layout(tuple(shape)) is None:
            grid = (
                "; torchvision.utils.make_grid makes one image of several"
                if len(shape) == 4
                else ""
            )
            raise self._error(f"an array of shape {tuple(shape)}", f"give {_IMAGE}{grid}")
        elif self.kind == "audio":
            if shape is None or len(shape) not in (1, 2):
                given = type(self.value).__name__ if shape is None else f"shape {tuple(shape)}"
                raise self._error(given, "give samples as an array [frames] or [channels, frames]")
            if self.sample_rate <= 0:
                raise self._error(f"sample_rate={self.sample_rate!r}", "give samples per second")

    def _error(self, given: str, remedy: str) -> OptionError:
        return OptionError(f"log_{self.kind}({self.name!r}) got {given}: {remedy}")

    def kept(self) -> Media:
        """Return the same with a value that nobody changes later. Does not wait for the device."""
        value = self.value
        if hasattr(value, "detach"):
            value = value.detach().clone()
        elif isinstance(value, np.ndarray):
            value = value.copy()
        return Media(self.kind, self.name, value, self.sample_rate)

    def converted(self) -> Media:
        """Return the same as loggers get it. Reads the device.

        An image is a uint8 array [H, W, 3] or [H, W, 4], a histogram a float64 array of its finite
        values, and audio an int16 array [frames, channels].
        """
        convert: dict[str, Callable[[Any], Any]] = {
            "image": _pixels,
            "histogram": _values,
            "audio": _samples,
            "text": str,
        }
        return Media(self.kind, self.name, convert[self.kind](self.value), self.sample_rate)


class LogsMedia:
    """The methods that log values other than numbers, of a run and of a task.

    Rank 0 logs. A logger that does not take a kind is reported once; see ``Logger.media``.
    """

    def _log_media(self, media: Media) -> None:
        """Log one value."""
        raise NotImplementedError

    def log_image(self, name: str, image: Any) -> None:
        """Log an image.

        Args:
            name: the full name, such as "eval/samples".
            image: a tensor or array [C, H, W], [H, W, C] or [H, W] with 1, 3 or 4 channels:
                uint8, or floats from 0 to 1. Or a PIL image.

        Raises:
            OptionError: it has another type or shape.
        """
        self._log_media(Media("image", name, image))

    def log_figure(self, name: str, figure: Any, *, close: bool = True) -> None:
        """Log a figure of matplotlib, drawn as an image.

        Args:
            name: the full name.
            figure: the figure.
            close: close it afterwards, so that pyplot does not keep it.

        Raises:
            OptionError: it is no figure.
        """
        if not callable(getattr(figure, "set_canvas", None)):
            kind = type(figure).__name__
            raise OptionError(f"log_figure({name!r}) got a {kind}: give a figure of matplotlib")
        self._log_media(Media("image", name, _drawn(figure)))
        pyplot = sys.modules.get("matplotlib.pyplot")
        if close and pyplot is not None:
            pyplot.close(figure)

    def log_text(self, name: str, text: str) -> None:
        """Log a text, such as a generated sample.

        Raises:
            OptionError: it is no string.
        """
        self._log_media(Media("text", name, text))

    def log_histogram(self, name: str, values: Any) -> None:
        """Log the distribution of the finite ones of ``values``, a tensor or array of any shape."""
        self._log_media(Media("histogram", name, values))

    def log_audio(self, name: str, audio: Any, sample_rate: int) -> None:
        """Log a sound.

        Args:
            name: the full name.
            audio: a tensor or array [frames] or [channels, frames]: floats from -1 to 1, or int16.
            sample_rate: samples per second.

        Raises:
            OptionError: it has another type or shape.
        """
        self._log_media(Media("audio", name, audio, sample_rate))


def wav(media: Media) -> bytes:
    """Return converted audio as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(media.value.shape[1])
        out.setsampwidth(2)
        out.setframerate(media.sample_rate)
        out.writeframes(media.value.astype("<i2").tobytes())
    return file.getvalue()


def png(pixels: Any) -> bytes:
    """Return a uint8 picture [height, width, 3 or 4] as a PNG file (RFC 2083) of three chunks."""
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    colour = 6 if channels == 4 else 2
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def to_numpy(value: Any) -> Any:
    """Return a tensor, an array or a sequence of numbers as an array on the CPU."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.to_dense() if value.is_sparse else value).resolve_conj()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return value.numpy()
    return np.asarray(value)


def _layout(shape: tuple[int, ...]) -> str | None:
    """Return the order of an image's axes, "CHW", "HWC" or "HW"; None where it is no image."""
    if not all(shape) or len(shape) not in (2, 3):
        return None
    if len(shape) == 2:
        return "HW"
    return "CHW" if shape[0] in _CHANNELS else "HWC" if shape[2] in _CHANNELS else None


def _pixels(image: Any) -> Any:
    # An image of PIL has its channels last, whatever its size.
    array = to_numpy(image.convert("RGBA") if hasattr(image, "convert") else image)
    if hasattr(image, "shape") and _layout(array.shape) == "CHW":
        array = np.moveaxis(array, 0, -1)
    array = array.reshape(*array.shape[:2], -1)
    if array.dtype == np.bool_ or array.dtype.kind in "fc":
        scaled = np.nan_to_num(array.real.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
        array = scaled.clip(0.0, 1.0) * 255.0
    array = array.clip(0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array)


def _values(values: Any) -> Any:
    array = to_numpy(values).ravel()
    array = (np.abs(array) if array.dtype.kind == "c" else array).astype(np.float64)
    return array[np.isfinite(array)]


def _samples(audio: Any) -> Any:
    array = to_numpy(audio)
    array = array.reshape(len(array), -1) if array.ndim == 1 else array
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    if array.dtype.kind == "f":
        array = np.nan_to_num(array.astype(np.float64)).clip(-1.0, 1.0) * math.nextafter(2**15, 0)
    return array.clip(-(2**15), 2**15 - 1).astype(np.int16)


def _drawn(figure: Any) -> Any:
    """Return a figure as an array [H, W, 4], with the canvas that it had before."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    before = figure.canvas
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).copy()
    figure.set_canvas(before)
    return pixels
