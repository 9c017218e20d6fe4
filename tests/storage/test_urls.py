"""What is a URL, and what a person reads who gives one that cannot be opened."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from loopkit import Fit
from loopkit.errors import MissingExtraError, OptionError
from loopkit.storage import as_place, as_url, local_copy_of
from loopkit.storage.urls import open_filesystem


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://bucket/runs/a", "s3://bucket/runs/a"),
        ("s3://bucket/runs/a/", "s3://bucket/runs/a"),
        (Path("s3://bucket/runs/a"), "s3://bucket/runs/a"),
        ("S3://Bucket/a", "s3://Bucket/a"),
        ("file:///tmp/a", "file:///tmp/a"),
        (Path("file:///tmp/a"), "file:///tmp/a"),
        ("memory://a", "memory://a"),
        ("runs/a", None),
        ("/tmp/s3:/a", None),
        (r"C:\runs\a", None),
        ("C:/runs/a", None),
        ("tasks.digits:Digits", None),
        (None, None),
    ],
)
def test_urls_and_paths_are_told_apart(place, url):
    assert as_url(place) == url
    if isinstance(place, str):
        assert as_place(place) == (url or Path(place))


@pytest.mark.parametrize("option", ["run_dir", "resume"])
def test_a_url_without_its_package_names_the_extra(monkeypatch, option):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        Fit(**{option: "s3://bucket/runs/a"})
    assert str(caught.value) == (
        f"{option}='s3://bucket/runs/a' needs the package 's3fs': pip install 'loopkit-torch[s3]'"
    )


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s4://bucket/a", "keeps no runs at s4://"),
        ("https://host/a", "Give a path, or a URL of s3://"),
        ("memory://", "names no place: give memory://bucket/folder"),
        ("simplecache::s3://bucket/a", "keeps no runs at simplecache://"),
    ],
)
def test_a_url_of_no_store_is_refused_before_anything_is_made(url, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=says):
        Fit(run_dir=url)
    assert list(tmp_path.iterdir()) == []


def test_local_copies_of_two_places_are_two_and_lie_below_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPKIT_STAGING", str(tmp_path))
    places = ["s3://b/a", "gs://b/a", "s3://b/a/../c", "s3://b/a%2Fc", "file:///b/a", "s3://b/ü/:x"]
    copies = [local_copy_of(place) for place in places]
    assert len(set(copies)) == len(places)
    assert all(copy.resolve().is_relative_to(tmp_path.resolve()) for copy in copies)
    assert copies[0] == tmp_path / "s3" / "b" / "a"


def test_a_file_system_keeps_no_listing():
    files = open_filesystem("memory://listing")
    files.pipe_file("/listing/a", b"1")
    assert files.find("/listing") == ["/listing/a"]
    open_filesystem("memory://listing").pipe_file("/listing/b", b"2")
    assert files.find("/listing") == ["/listing/a", "/listing/b"]
