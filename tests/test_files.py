"""Files that are replaced in one piece."""

from __future__ import annotations

import os

import pytest

from loopkit.files import rename_aside, replacing, write_file


def test_a_file_is_replaced_in_one_piece_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_file(path, [b"old"])
    with replacing(path) as temporary:
        assert temporary.suffix == ".jsonl"
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_file(path, [b"old"])

    def parts():
        yield b"ne"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, parts())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("durable", "expected"), [(True, ["sync", "replace"]), (False, ["replace"])]
)
def test_what_is_durable_is_on_the_disk_before_it_replaces(
    durable, expected, tmp_path, monkeypatch
):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_file(tmp_path / "file", [b"a", b"b"], durable=durable)
    assert calls == expected
    assert (tmp_path / "file").read_bytes() == b"ab"


def test_a_name_is_freed_by_a_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rename_aside(path)
    for content in ("1", "2", "3"):
        rename_aside(path)
        path.write_text(content)
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {"metrics.1.jsonl": "1", "metrics.2.jsonl": "2", "metrics.jsonl": "3"}
