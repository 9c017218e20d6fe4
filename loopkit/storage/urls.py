"""URLs of object storage: which text is one, and which package opens it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

from loopkit.errors import OptionError, missing_extra, nearest

# By scheme: the class of the file system, and the extra of loopkit that installs its package.
SCHEMES = {
    "s3": ("s3fs.S3FileSystem", "s3"),
    "gs": ("gcsfs.GCSFileSystem", "gcs"),
    "gcs": ("gcsfs.GCSFileSystem", "gcs"),
    "az": ("adlfs.AzureBlobFileSystem", "azure"),
    "abfs": ("adlfs.AzureBlobFileSystem", "azure"),
    "file": ("fsspec.implementations.local.LocalFileSystem", ""),
    "memory": ("fsspec.implementations.memory.MemoryFileSystem", ""),
}
# By the name that pyarrow gives a file system: the scheme of its URLs.
_ARROW = {"local": "", "s3": "s3://", "gcs": "gs://", "abfs": "abfs://"}
# Path("s3://bucket/run") has one slash. A drive of Windows has one letter.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+|:)(.*)", flags=re.DOTALL)


def as_url(place: object) -> str | None:
    """Return a place as a URL, without a slash at its end; None if it is a path or nothing.

    A Path that was made of a URL is the URL again.
    """
    match = _URL.match(str(place)) if isinstance(place, (str, os.PathLike)) else None
    if match is None:
        return None
    scheme, rest = match[1].lower(), match[2].rstrip("/")
    return f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def as_place(text: str) -> Path | str:
    """Return what a person typed: a path, or a URL as text."""
    return as_url(text) or Path(text)


def place_of(checkpoint: Any, option: str) -> Any:
    """Return the path or URL of a ``ray.train.Checkpoint``, and anything else as it is.

    Args:
        checkpoint: what the user gave.
        option: how the user gave it, for messages.

    Raises:
        OptionError: Ray keeps the checkpoint where loopkit cannot read.
    """
    if not type(checkpoint).__module__.startswith("ray."):
        return checkpoint
    kind = checkpoint.filesystem.type_name
    if kind not in _ARROW:
        raise OptionError(
            f"{option}={checkpoint}: loopkit does not read from {kind!r}. Give a directory to which "
            "checkpoint.to_directory() has copied it"
        )
    return f"{_ARROW[kind]}{checkpoint.path}"


def child(url: str, *names: str) -> str:
    """Return the URL of what lies below ``url``."""
    return "/".join((url, *names))


def check_url(url: str, option: str) -> None:
    """Check that ``url`` can be opened here, without opening it.

    Args:
        url: as :func:`as_url` returns it.
        option: how the user gave it, for messages.

    Raises:
        OptionError: the scheme is not known, or no bucket or folder is named.
        MissingExtraError: the package of the scheme is not installed.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise OptionError(
            f"{option}={url!r}: loopkit keeps no runs at {scheme}://.{nearest(scheme, SCHEMES)} "
            f"Give a path, or a URL of {known}"
        )
    if not rest.strip("/"):
        raise OptionError(f"{option}={url!r} names no place: give {scheme}://bucket/folder")
    _filesystem_class(scheme, f"{option}={url!r}")


def open_filesystem(url: str) -> Any:
    """Return a new fsspec file system for ``url``, which keeps no listing of what it saw earlier.

    Raises:
        OptionError, MissingExtraError: as :func:`check_url`.
    """
    check_url(url, "the URL")
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    configured = _configured(scheme)
    if scheme == "file":
        options["auto_mkdir"] = True
    if scheme == "s3":
        # botocore would draw its pauses from Python's generator, whose state belongs to the run.
        own = {"retries": {"total_max_attempts": 1}}
        configured["config_kwargs"] = own | configured.get("config_kwargs", {})
    kind = _filesystem_class(scheme, url)
    if kind.__module__.startswith("gcsfs."):
        # So would gcsfs, which has no setting for it.
        vars(sys.modules["gcsfs.retry"])["random"] = random.Random()
    return kind(**configured, **options)


def _configured(scheme: str) -> dict[str, Any]:
    """Return the settings that the user gave fsspec for this scheme, in its files or variables."""
    from fsspec.config import conf

    return dict(conf.get(scheme, {}))


def _filesystem_class(scheme: str, use: str) -> Any:
    path, extra = SCHEMES[scheme]
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is not None:
            raise  # it is installed, and broken: its own error says how
        raise missing_extra(package, extra, use) from error
