"""Every way a file can be wrong is found before anything is returned, and named; the one before is
used.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from snapshots import alike, make

from loopkit.checkpoint import (
    Store,
    load_newest,
    newest_valid,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from loopkit.checkpoint.format import dump_json
from loopkit.checkpoint.manifest import checksum
from loopkit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LoopkitWarning,
    NoValidCheckpointError,
    RunDirError,
)

TENSOR_FILES = ["model.safetensors", "optimizer.safetensors", "state.safetensors"]
FILES = [*TENSOR_FILES, "state.json", "config.json", "tokenizer/vocab.txt", "MANIFEST.json"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("pristine")
    for step in (1, 2, 3):
        write_checkpoint(Store(), run_dir, make(step))
    return run_dir


@pytest.fixture
def run_dir(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-000000000003"


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def from_step_1(path: Path) -> None:
    path.write_bytes(Path(str(path).replace("step-000000000003", "step-000000000001")).read_bytes())


def zero_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


ANY_FILE: dict[str, Callable[[Path], object]] = {
    "truncated to nothing": lambda p: p.write_bytes(b""),
    "truncated by one byte": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "truncated by half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "one byte more": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "a page more": lambda p: p.write_bytes(p.read_bytes() + bytes(4096)),
    "zeroed to the end": zero_page,
    "all zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "first bit flipped": lambda p: flip(p, 0),
    "last bit flipped": lambda p: flip(p, -1, 0x80),
    "middle bit flipped": lambda p: flip(p, p.stat().st_size // 2),
    "deleted": lambda p: p.unlink(),
    "replaced by a folder": lambda p: (p.unlink(), p.mkdir()),
    "replaced by a link": lambda p: (p.rename(p.with_name("moved")), p.symlink_to("moved")),
    "replaced by a named pipe": lambda p: (p.unlink(), os.mkfifo(p)),
}
TENSOR_FILE: dict[str, Callable[[Path], object]] = {
    "header length grown": lambda p: flip(p, 0, 0x10),
    "header length huge": lambda p: flip(p, 7, 0x7F),
    "flip in the header": lambda p: flip(p, 30),
    "flip in a name": lambda p: flip(p, p.read_bytes().index(b"dtype") - 4),
    "flip in the padding": lambda p: p.write_bytes(_pad_flip(p)),
    "flip in the data": lambda p: flip(p, header_size(p)),
    "from another checkpoint": from_step_1,
}


def _pad_flip(path: Path) -> bytes:
    data, end = bytearray(path.read_bytes()), header_size(path)
    # Tab is white space too: the header still parses, and only the hash of the file can tell.
    assert data[end - 1 : end] in (b" ", b"}")
    data[data.index(b'"shape":') + 8 : 0] = b""
    data[end - 1 : end] = b"\t" if data[end - 1 : end] == b" " else b"]"
    return bytes(data)


CASES = [(file, name, damage) for file in FILES for name, damage in ANY_FILE.items()] + [
    (file, name, damage) for file in TENSOR_FILES for name, damage in TENSOR_FILE.items()
]


@pytest.mark.parametrize(
    ("file", "damage"), [(f, d) for f, _, d in CASES], ids=[f"{f}: {n}" for f, n, _ in CASES]
)
def test_damage_is_found_and_named_and_the_one_before_is_used(run_dir, file, damage):
    damage(newest(run_dir) / file)
    with pytest.raises(CorruptCheckpointError, match=file.replace(".", r"\.")):
        read_checkpoint(Store(), newest(run_dir))
    (problem,) = verify_checkpoint(Store(), newest(run_dir))
    assert file in problem
    told: list[str] = []
    path, snapshot = load_newest(Store(), run_dir, warn=told.append)
    assert path.name == "step-000000000002"
    assert alike(snapshot, make(2))
    assert len(told) == 1
    assert problem in told[0]
    assert sorted(os.listdir(run_dir / "checkpoints")) == [
        "latest",
        "step-000000000001",
        "step-000000000002",
        "step-000000000003.corrupt-1",
    ]


@pytest.mark.parametrize("name", ["embed.weight", "bias", "steps", "transposed"])
def test_the_damaged_tensor_is_named(run_dir, name):
    file = newest(run_dir) / "model.safetensors"
    head = header_size(file)
    begin, end = json.loads(file.read_bytes()[8:head])[name]["data_offsets"]
    for at in (begin, end - 1):
        flip(file, head + at)
        with pytest.raises(
            CorruptCheckpointError, match=rf"model\.safetensors: damaged in tensor '{name}'"
        ):
            read_checkpoint(Store(), newest(run_dir))
        flip(file, head + at)
    assert verify_checkpoint(Store(), newest(run_dir)) == []


def test_all_damaged_tensors_are_named(run_dir):
    zero_page(newest(run_dir) / "model.safetensors")
    (problem,) = verify_checkpoint(Store(), newest(run_dir))
    assert problem.endswith(
        "model.safetensors: damaged in tensors 'transposed', 'steps', 'embed.weight', 'bias'"
    )


def test_every_single_byte_of_a_checkpoint_matters(run_dir):
    for file in FILES:
        path = newest(run_dir) / file
        for at in range(0, path.stat().st_size, 1 if path.stat().st_size < 400 else 13):
            flip(path, at)
            assert verify_checkpoint(Store(), newest(run_dir)) != [], f"{file}, byte {at}"
            flip(path, at)
    assert verify_checkpoint(Store(), newest(run_dir)) == []


EDITS: dict[str, Callable[[dict], object]] = {
    "step": lambda m: m.update(step=4),
    "metric": lambda m: m["metrics"].update({"eval/accuracy": 1.0}),
    "a file taken out": lambda m: m["files"].pop(),
    "a size": lambda m: m["files"][0].update(size=1),
    "a shape": lambda m: m["tensors"]["model"]["bias"].update(shape=[8]),
    "an alias": lambda m: m["aliases"]["model"].update({"head.weight": "bias"}),
    "version": lambda m: m.update(version=9),
    "min_reader": lambda m: m.update(min_reader=1),
    "a new field": lambda m: m.update(extra=1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_found(run_dir, edit):
    path = newest(run_dir) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_bytes(dump_json(manifest))
    with pytest.raises(CorruptCheckpointError, match="edited or damaged"):
        read_checkpoint(Store(), newest(run_dir))
    assert newest_valid(Store(), run_dir, warn=lambda text: None).name == "step-000000000002"


def test_a_manifest_written_in_another_way_is_found(run_dir):
    path = newest(run_dir) / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True))
    assert "edited or damaged" in verify_checkpoint(Store(), newest(run_dir))[0]


def test_a_checkpoint_under_another_step_s_name_is_found(run_dir):
    (run_dir / "checkpoints" / "step-000000000002").rename(
        run_dir / "checkpoints" / "step-000000000009"
    )
    told: list[str] = []
    assert newest_valid(Store(), run_dir, warn=told.append).name == "step-000000000003"
    assert "is that of step-000000000002" in told[0]


def test_a_checkpoint_copied_elsewhere_can_be_read(run_dir, tmp_path):
    shutil.copytree(newest(run_dir), tmp_path / "mine")
    assert alike(read_checkpoint(Store(), tmp_path / "mine"), make(3))
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert alike(read_checkpoint(Store(), tmp_path / "link"), make(3))


def test_files_that_are_not_listed_are_left_alone(run_dir):
    (newest(run_dir) / "notes.txt").write_text("mine")
    assert verify_checkpoint(Store(), newest(run_dir)) == []


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\0" * 99, b"[1]", b'{"dir":"../x"}', b'{"dir":3}', b"[" * 100000]
)
def test_a_garbage_latest_is_named_and_ignored(run_dir, content):
    (run_dir / "checkpoints" / "latest").write_bytes(content)
    told: list[str] = []
    assert newest_valid(Store(), run_dir, warn=told.append) == newest(run_dir)
    assert len(told) == 1
    assert "latest is damaged and ignored" in told[0]


def test_a_latest_that_is_a_link_or_huge_is_ignored(run_dir):
    latest = run_dir / "checkpoints" / "latest"
    for make_it in (
        lambda: latest.symlink_to("/etc/passwd"),
        lambda: os.truncate(_touch(latest), 1 << 40),
    ):
        latest.unlink()
        make_it()
        told: list[str] = []
        assert newest_valid(Store(), run_dir, warn=told.append) == newest(run_dir)
        assert "ignored" in told[0]


def _touch(path: Path) -> Path:
    path.touch()
    return path


def test_a_missing_newest_checkpoint_is_noticed_by_latest(run_dir):
    shutil.rmtree(newest(run_dir))
    told: list[str] = []
    assert newest_valid(Store(), run_dir, warn=told.append).name == "step-000000000002"
    assert "names step-000000000003, which is not there" in told[0]


def test_without_a_callback_a_warning_is_given(run_dir):
    flip(newest(run_dir) / "state.json", 5)
    with pytest.warns(LoopkitWarning, match=r"corrupt checkpoint: .*state\.json"):
        newest_valid(Store(), run_dir)


def test_a_second_corrupt_one_of_the_same_step_gets_the_next_number(run_dir):
    for _ in range(2):
        flip(newest(run_dir) / "state.json", 5)
        newest_valid(Store(), run_dir, warn=lambda text: None)
        write_checkpoint(Store(), run_dir, make(3))
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("*3*")) == [
        "step-000000000003",
        "step-000000000003.corrupt-1",
        "step-000000000003.corrupt-2",
    ]
    assert alike(load_newest(Store(), run_dir)[1], make(3))


def test_looking_without_quarantine_changes_nothing(run_dir):
    flip(newest(run_dir) / "state.json", 5)
    before = sorted(os.listdir(run_dir / "checkpoints"))
    assert (
        newest_valid(Store(), run_dir, warn=lambda text: None, quarantine=False).name
        == "step-000000000002"
    )
    assert sorted(os.listdir(run_dir / "checkpoints")) == before


def test_all_bad_lists_each_with_its_reason_again_and_again(run_dir):
    for path in (run_dir / "checkpoints").glob("step-*"):
        flip(path / "state.json", 5)
    for _ in range(2):
        with pytest.raises(NoValidCheckpointError) as caught:
            newest_valid(Store(), run_dir, warn=lambda text: None)
        assert caught.value.exit_code == 65
        for step in (1, 2, 3):
            assert f"step-00000000000{step}: " in str(caught.value)
        assert str(caught.value).count("state.json") == 3


def test_only_quarantined_ones_are_never_a_silent_start_from_zero(run_dir):
    for path in (run_dir / "checkpoints").glob("step-*"):
        path.rename(path.with_name(path.name + ".corrupt-1"))
    (run_dir / "checkpoints" / "latest").unlink()
    with pytest.raises(NoValidCheckpointError, match="quarantined before"):
        newest_valid(Store(), run_dir)


def test_a_run_that_can_only_be_read_is_read_all_the_same(run_dir):
    class ReadOnly(Store):
        def rename(self, path, target):
            raise RunDirError("read only")

    flip(newest(run_dir) / "state.json", 5)
    told: list[str] = []
    assert newest_valid(ReadOnly(), run_dir, warn=told.append).name == "step-000000000002"
    assert "kept as step-000000000003;" in told[0]


def test_what_cannot_be_read_for_another_reason_is_not_called_corrupt(run_dir):
    class Denied(Store):
        def _op(self, kind, path, extra=None):
            if kind == "open" and path.name == "model.safetensors":
                raise PermissionError(13, "Permission denied")

    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        newest_valid(Denied(), run_dir)
    assert not isinstance(caught.value, CorruptCheckpointError | NoValidCheckpointError)
    assert newest(run_dir).exists()


def test_a_kind_of_checkpoint_can_be_asked_for(run_dir):
    weights = make(5)
    weights.meta["kind"] = "weights"
    path = write_checkpoint(Store(), run_dir, weights)
    assert newest_valid(Store(), run_dir) == path
    assert newest_valid(Store(), run_dir, kind="full") == newest(run_dir)


def test_a_manifest_that_lies_with_a_right_checksum_is_found(run_dir):
    path = newest(run_dir) / "MANIFEST.json"
    good = json.loads(path.read_text())

    def lie(change: Callable[[dict], object]) -> str:
        manifest = json.loads(json.dumps(good))
        change(manifest)
        manifest["checksum"] = checksum(manifest)
        path.write_bytes(dump_json(manifest))
        (problem,) = verify_checkpoint(Store(), newest(run_dir))
        return problem

    assert "unsafe" in lie(
        lambda m: m["files"][0].update(path="../../step-000000000001/model.safetensors")
    )
    assert "unsafe" in lie(lambda m: m["files"].append(dict(m["files"][0])))
    assert "cover it exactly once" in lie(lambda m: m["tensors"]["model"]["bias"].update(shape=[8]))
    assert "header entry" in lie(lambda m: _reshape(m["tensors"]["model"]["bias"], [8]))
    assert "header entry" in lie(lambda m: m["tensors"]["model"]["bias"].update(dtype="F16"))
    assert "header entry" in lie(lambda m: m["tensors"]["model"]["bias"].update(dtype="os.system"))
    assert "differ in tensor 'bias'" in lie(lambda m: m["tensors"]["model"].pop("bias"))
    assert "not listed" in lie(
        lambda m: m["tensors"]["model"]["bias"]["chunks"][0].update(file="/etc/passwd")
    )
    assert "which is missing" in lie(lambda m: m["aliases"]["model"].update({"x": "y"}))
    assert "not a count" in lie(lambda m: m["files"][0].update(size=-1))
    assert "not a count" in lie(lambda m: m["files"][0].update(size=True))
    assert "not a count" in lie(lambda m: m.update(step=1.5))
    assert "KeyError" in lie(lambda m: m.pop("step"))
    assert "state.json" in lie(
        lambda m: [m["files"].remove(f) for f in m["files"] if f["path"] == "state.json"]
    )
    assert "TypeError" in lie(lambda m: m.update(tensors={"model": {"w": []}}))
    assert "AttributeError" in lie(lambda m: m.update(tensors=[]))
    assert "not a loopkit-checkpoint" in lie(lambda m: m.update(format="other"))


def _reshape(record: dict, shape: list[int]) -> None:
    record["shape"] = record["chunks"][0]["shape"] = shape


def test_reading_without_the_hash_still_checks_each_tensor(run_dir):
    assert alike(read_checkpoint(Store(), newest(run_dir), verify=False), make(3))
    (newest(run_dir) / "config.json").write_bytes(b"[" * 22)
    assert read_checkpoint(Store(), newest(run_dir), verify=False).files["config.json"] == b"[" * 22
    flip(newest(run_dir) / "model.safetensors", -1)
    with pytest.raises(CorruptCheckpointError, match="damaged in tensor"):
        read_checkpoint(Store(), newest(run_dir), verify=False)
