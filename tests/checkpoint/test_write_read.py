from __future__ import annotations

import json
import os
import shutil
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from snapshots import alike, alike_tensors, make

from loopkit.checkpoint import (
    Snapshot,
    Store,
    clean,
    detach_after,
    digests,
    load_newest,
    newest_valid,
    read_checkpoint,
    scan,
    streams,
    verify_checkpoint,
    write_checkpoint,
)
from loopkit.checkpoint import writer as writer_module
from loopkit.checkpoint.format import dump_json
from loopkit.checkpoint.manifest import (
    Chunk,
    TensorRecord,
    check_coverage,
    checksum,
    parse_manifest,
)
from loopkit.checkpoint.safetensors_io import CODE_OF
from loopkit.checkpoint.streams import CHUNK
from loopkit.errors import CheckpointError, OptionError, RunDirError


def only(model: dict[str, torch.Tensor], **meta: object) -> Snapshot:
    return Snapshot({"model": model}, {}, {"step": 1, **meta})


def test_a_snapshot_comes_back_as_it_was(tmp_path):
    path = write_checkpoint(Store(), tmp_path, make(3))
    assert path == tmp_path / "checkpoints" / "step-000000000003"
    assert alike(read_checkpoint(Store(), path), make(3))
    assert verify_checkpoint(Store(), path) == []


def test_what_was_read_can_be_written_again(tmp_path):
    first = read_checkpoint(Store(), write_checkpoint(Store(), tmp_path, make(3)))
    assert alike(read_checkpoint(Store(), write_checkpoint(Store(), tmp_path, first)), make(3))


def test_meta_keeps_values_that_json_has_not(tmp_path):
    meta = {"step": 1, "metrics": {"loss": float("nan"), "x": float("inf")}, "mesh": (2, 2)}
    got = read_checkpoint(Store(), write_checkpoint(Store(), tmp_path, Snapshot({}, {}, meta)))
    assert got.meta.pop("generation") == 1
    assert alike({name: got.meta[name] for name in meta}, meta)


@pytest.mark.parametrize(
    "meta", [{}, {"step": -1}, {"step": "1"}, {"step": 1, "files": []}, {"step": 1, "$x": 1}]
)
def test_meta_that_cannot_be_kept_is_refused_and_leaves_nothing(tmp_path, meta):
    with pytest.raises(ValueError):
        write_checkpoint(Store(), tmp_path, Snapshot({}, {}, meta))
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_written_once_and_come_back_as_one(tmp_path):
    path = write_checkpoint(Store(), tmp_path, make(1))
    assert json.loads((path / "MANIFEST.json").read_text())["aliases"] == {
        "model": {"head.weight": "embed.weight"}
    }
    model = read_checkpoint(Store(), path).tensors["model"]
    assert model["head.weight"] is model["embed.weight"]


def test_views_of_one_storage_that_differ_are_written_separately(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    model = {
        "all": base,
        "row": base[1],
        "turned": base.t(),
        "bits": base.view(torch.int32),
        "tail": base[:, 2:],
    }
    got = read_checkpoint(Store(), write_checkpoint(Store(), tmp_path, only(model)))
    assert alike_tensors(got.tensors["model"], model)


@pytest.mark.parametrize("dtype", sorted(CODE_OF, key=str), ids=str)
def test_every_dtype_is_read_alike_by_us_and_by_safetensors(tmp_path, dtype):
    raw = torch.arange(2 * 3 * 16, dtype=torch.uint8)
    values = (raw % 2 == 0) if dtype == torch.bool else raw.view(dtype)
    model = {
        "a": values.reshape(2, -1),
        "scalar": values[1].clone(),
        "none": values[:0].reshape(0, 2),
    }
    path = write_checkpoint(Store(), tmp_path, only(model))
    assert alike_tensors(read_checkpoint(Store(), path).tensors["model"], model)
    theirs = load_file(path / "model.safetensors")
    assert alike({name: theirs[name] for name in model}, model)


def test_conjugated_negated_and_expanded_tensors_are_written_as_their_values(tmp_path):
    base = torch.randn(3, 2, dtype=torch.complex64)
    model = {
        "conj": base.conj(),
        "imag": base.conj().imag,
        "wide": torch.ones(1).expand(5),
        "plain": base,
    }
    got = read_checkpoint(Store(), write_checkpoint(Store(), tmp_path, only(model))).tensors[
        "model"
    ]
    assert all(alike(got[name], model[name].resolve_conj().resolve_neg()) for name in model)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=["complex128", "sparse", "meta"],
)
def test_a_tensor_that_the_format_has_not_is_refused_by_name(tmp_path, tensor):
    with pytest.raises(TypeError, match=r"model tensor 'a\.b'"):
        write_checkpoint(Store(), tmp_path, only({"a.b": tensor}))


def test_a_value_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"hooks\.H\.cache"):
        write_checkpoint(
            Store(), tmp_path, Snapshot({}, {"hooks": {"H": {"cache": object()}}}, {"step": 1})
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a//b", "MANIFEST.json", "state.json", "model.safetensors", "", "a/..", "."],
)
def test_extra_files_cannot_take_other_names(tmp_path, name):
    snapshot = make(1)
    snapshot.files[name] = b"x"
    with pytest.raises(ValueError, match="cannot be the name"):
        write_checkpoint(Store(), tmp_path, snapshot)


def test_the_file_is_the_one_safetensors_would_read_with_tied_weights(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 3, bias=False)
            self.b = torch.nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    module, other = Tied(), Tied()
    path = write_checkpoint(Store(), tmp_path, only(dict(module.state_dict(keep_vars=True))))
    load_model(other, path / "model.safetensors", strict=True)
    assert torch.equal(other.a.weight, module.a.weight)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "b.weight": "a.weight"}


def test_hugging_face_style_names_open_with_safetensors(tmp_path):
    names = {f"h.{i}.attn.w": torch.randn(2, 2) for i in range(3)}
    path = write_checkpoint(Store(), tmp_path, only(names))
    save_file(names, tmp_path / "theirs.safetensors")
    assert alike(load_file(path / "model.safetensors"), load_file(tmp_path / "theirs.safetensors"))


def test_writing_does_not_build_the_file_in_memory(tmp_path):
    model = {f"w{i}": torch.ones(2 << 20) for i in range(8)}
    tracemalloc.start()
    try:
        write_checkpoint(Store(), tmp_path, only(model))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_the_same_step_again_gets_the_next_generation_and_is_newer(tmp_path):
    store = Store()
    names = [write_checkpoint(store, tmp_path, make(seed, step=10)).name for seed in range(12)]
    assert names[:3] == ["step-000000000010", "step-000000000010-g2", "step-000000000010-g3"]
    assert newest_valid(store, tmp_path).name == "step-000000000010-g12"
    assert alike(read_checkpoint(store, newest_valid(store, tmp_path)), make(11, step=10))
    assert [entry.generation for entry in scan(store, tmp_path)] == list(range(1, 13))


def test_latest_names_the_checkpoint_and_its_manifest(tmp_path):
    write_checkpoint(Store(), tmp_path, make(1))
    path = write_checkpoint(Store(), tmp_path, make(2))
    latest = json.loads((tmp_path / "checkpoints" / "latest").read_text())
    digest = digests.of((path / "MANIFEST.json").read_bytes())
    assert latest == {"dir": path.name, "step": 2, "generation": 1, "digest": digest}


def test_no_checkpoints_at_all_is_none(tmp_path):
    assert newest_valid(Store(), tmp_path) is None
    assert newest_valid(Store(), tmp_path / "nowhere") is None
    assert scan(Store(), tmp_path) == []


def test_what_is_mapped_from_a_file_lies_as_torch_allocates(tmp_path):
    """By 64 bytes, as far as sizes allow: otherwise sums over it may be rounded otherwise."""
    shapes = {"a": (1,), "b": (5, 16), "c": (3, 2), "d": (64,), "e": (0,), "f": (8,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()} | {
        "g": torch.ones(7, dtype=torch.float64)
    }
    path = write_checkpoint(Store(), tmp_path, Snapshot({"model": dict(tensors)}, {}, {"step": 1}))
    with safe_open(path / "model.safetensors", "pt") as file:
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert torch.equal(found, tensor)
            size = tensor.numel() * tensor.element_size()
            assert size == 0 or found.data_ptr() % min(64, size & -size) == 0


def test_order_goes_by_step_whatever_the_clock_said(tmp_path):
    for step in (30, 10, 20):
        path = write_checkpoint(Store(), tmp_path, make(step))
        os.utime(path, (2e9 - step, 2e9 - step * 1000))
    assert newest_valid(Store(), tmp_path).name == "step-000000000030"


def test_a_run_directory_with_an_odd_name(tmp_path):
    run_dir = tmp_path / "é 😀 %s\n*"
    run_dir.mkdir()
    assert alike(read_checkpoint(Store(), write_checkpoint(Store(), run_dir, make(1))), make(1))


def test_a_run_directory_that_vanished_is_named(tmp_path):
    with pytest.raises(RunDirError, match="gone"):
        write_checkpoint(Store(), tmp_path / "gone" / "run", make(1))


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_checkpoint(Store(), tmp_path / "nothing")


def test_clean_removes_what_the_dead_left_and_not_what_the_living_write(tmp_path):
    write_checkpoint(Store(), tmp_path, make(1))
    parent = tmp_path / "checkpoints"
    mine = writer_module.staging_name()
    host, pid, start = mine.removeprefix(".staging-").rsplit("-", 1)[0].rsplit("-", 2)
    dead = [
        f".staging-{host}-999999999-1-ab",
        f".staging-{host}-{pid}-{int(start) + 1}-ab",
        f".staging-elsewhere-{pid}-{start}-ab",
        ".staging-odd",
        ".deleting-step-000000000001-ab",
    ]
    for name in [mine, *dead]:
        (parent / name / "shards").mkdir(parents=True)
        (parent / name / "shards" / "x").write_bytes(b"x")
    (parent / ".deleting-link").symlink_to(parent / "step-000000000001")
    assert sorted(clean(Store(), tmp_path)) == sorted([*dead, ".deleting-link"])
    assert sorted(os.listdir(parent)) == sorted([mine, "step-000000000001", "latest"])
    assert verify_checkpoint(Store(), parent / "step-000000000001") == []


def test_chunks_must_tile_the_tensor(tmp_path):
    path = write_checkpoint(Store(), tmp_path, only({"w": torch.zeros(4, 6)}))
    manifest = parse_manifest((path / "MANIFEST.json").read_bytes())

    def covered(
        *boxes: tuple[tuple[int, ...], tuple[int, ...]], file: str = "model.safetensors"
    ) -> bool:
        chunks = []
        for number, (offset, shape) in enumerate(boxes):
            name = file if number == 0 else f"{number}.safetensors"
            manifest.files.setdefault(name, manifest.files["state.json"]) if number else None
            chunks.append(Chunk(name, offset, shape, 0))
        manifest.tensors["model"]["w"] = TensorRecord("F32", (4, 6), tuple(chunks))
        try:
            check_coverage(manifest)
        except ValueError:
            return False
        return True

    assert covered(((0, 0), (4, 6)))
    assert covered(((0, 0), (2, 6)), ((2, 0), (2, 6)))
    assert covered(((0, 0), (2, 2)), ((2, 0), (2, 2)), ((0, 2), (4, 4)))
    assert not covered()
    assert not covered(((0, 0), (2, 6)))
    assert not covered(((0, 0), (2, 6)), ((1, 0), (2, 6)))
    assert not covered(((0, 0), (2, 6)), ((0, 0), (2, 6)))
    assert not covered(((0, 0), (3, 6)), ((2, 0), (2, 6)))
    assert not covered(((1, 0), (4, 6)))
    assert not covered(((0,), (24,)))
    assert not covered(((0, 0), (4, 6)), file="elsewhere.safetensors")


def test_a_tensor_in_chunks_is_put_together(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    parts = {"a": ((0, 0), whole[:2]), "b": ((2, 0), whole[2:, :1]), "c": ((2, 1), whole[2:, 1:])}
    path = write_checkpoint(
        Store(),
        tmp_path,
        Snapshot({prefix: {"w": part} for prefix, (_, part) in parts.items()}, {}, {"step": 1}),
    )
    manifest = parse_manifest((path / "MANIFEST.json").read_bytes())
    chunks = []
    for prefix, (offset, _) in parts.items():
        (chunk,) = manifest.tensors.pop(prefix)["w"].chunks
        chunks.append(Chunk(chunk.file, offset, chunk.shape, chunk.digest))
    manifest.tensors["model"] = {"w": TensorRecord("F32", (4, 6), tuple(chunks))}
    (path / "MANIFEST.json").write_bytes(manifest.dump())
    assert alike(read_checkpoint(Store(), path).tensors, {"model": {"w": whole}})
    assert verify_checkpoint(Store(), path) == []


def test_a_coverage_gap_stops_the_commit(tmp_path, monkeypatch):
    def gap(manifest):
        raise ValueError("the chunks of model tensor 'w' do not cover it exactly once")

    monkeypatch.setattr(writer_module, "check_coverage", gap)
    with pytest.raises(CheckpointError, match="not saved: the chunks of model tensor 'w'"):
        write_checkpoint(Store(), tmp_path, only({"w": torch.zeros(1)}))
    assert list((tmp_path / "checkpoints").iterdir()) == []


# Versions
# ---------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", [1, 2])
def test_the_golden_checkpoint_of_each_version_reads_as_ever(version):
    (path,) = (GOLDEN / f"v{version}" / "checkpoints").glob("step-*")
    assert verify_checkpoint(Store(), path) == []
    got = read_checkpoint(Store(), path)
    model = got.tensors["model"]
    assert model["weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert model["tied"] is model["weight"]
    assert (model["half"].dtype, model["half"].tolist()) == (torch.bfloat16, [1.5, -2.0])
    assert got.tensors["optimizer"]["weight/step"].item() == 7
    assert list(got.tensors) == ["model", "optimizer"]
    assert got.state["counters"] == {"step": 7, "samples": 2**60}
    assert got.state["window"] == (1.0, {"a", "b"}, b"\x00\xff")
    assert got.state["rng"].tolist() == [1, 2, 3]
    assert got.state["array"].tolist() == [0.5, 0.25]
    assert got.meta == {
        "step": 7,
        "epoch": 1,
        "kind": "full",
        "metrics": {"eval/accuracy": 0.5, "eval/loss": float("inf")},
        "generation": 1,
    }
    assert got.files == {"config.json": b'{"model_type": "golden"}'}


def _as_version(path: Path, **fields: object) -> bytes:
    raw = json.loads((path / "MANIFEST.json").read_text())
    raw.update(fields)
    raw["checksum"] = checksum(raw)
    return dump_json(raw)


def test_a_manifest_of_a_later_version_that_we_can_read_is_read(tmp_path):
    path = write_checkpoint(Store(), tmp_path, make(1))
    (path / "MANIFEST.json").write_bytes(_as_version(path, version=9, novelty={"a": 1}))
    assert read_checkpoint(Store(), path).meta["novelty"] == {"a": 1}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_flipped_bit_is_found_in_each_version(tmp_path, version, file):
    (golden,) = (GOLDEN / f"v{version}" / "checkpoints").glob("step-*")
    path = Path(shutil.copytree(golden, tmp_path / golden.name))
    data = bytearray((path / file).read_bytes())
    data[-1] ^= 1
    (path / file).write_bytes(data)
    (problem,) = verify_checkpoint(Store(), path)
    assert ("damaged in tensor" if "model" in file else "(checksum)") in problem


@pytest.mark.parametrize("digest", ["md5:0", "xxh3-64", "", 7, None])
def test_a_checksum_of_an_unknown_method_is_an_error_of_the_manifest(tmp_path, digest):
    path = write_checkpoint(Store(), tmp_path, make(1))
    raw = json.loads((path / "MANIFEST.json").read_text())
    raw["files"][0]["digest"] = digest
    raw["checksum"] = checksum(raw)
    (path / "MANIFEST.json").write_bytes(dump_json(raw))
    problem = verify_checkpoint(Store(), path)
    assert problem
    assert all(("checksum" in line) or ("digest" in line) for line in problem)


def test_a_version_too_new_is_named_and_not_quarantined(tmp_path):
    write_checkpoint(Store(), tmp_path, make(1))
    path = write_checkpoint(Store(), tmp_path, make(2))
    (path / "MANIFEST.json").write_bytes(_as_version(path, version=9, min_reader=8))
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    for ask in (lambda: newest_valid(Store(), tmp_path), lambda: read_checkpoint(Store(), path)):
        with pytest.raises(CheckpointError, match="needs a reader of version 8"):
            ask()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before
    assert "version 8" in scan(Store(), tmp_path)[1].problem


def test_an_old_manifest_is_migrated_step_by_step(tmp_path):
    path = write_checkpoint(Store(), tmp_path, make(1))
    old = _as_version(path, version=0)

    def from_zero(raw):
        return {**raw, "epoch": raw["epoch"] + 100}

    assert parse_manifest(old, migrations={0: from_zero, 1: dict}).meta["epoch"] == 100
    with pytest.raises(CheckpointError, match="format version 0 is no longer supported"):
        parse_manifest(old)


def test_files_of_many_pieces_are_hashed_as_they_are(tmp_path):
    size = (CHUNK * 3 + 12345) // 4
    model = {
        "big": torch.arange(size, dtype=torch.int32),
        "small": torch.ones(3),
        "other": torch.arange(size) % 7,
    }
    snapshot = only(model)
    snapshot.files["blob.bin"] = bytes(range(256)) * (CHUNK // 100)
    threads = set(threading.enumerate())
    path = write_checkpoint(Store(), tmp_path, snapshot)
    manifest = parse_manifest((path / "MANIFEST.json").read_bytes())
    for record in manifest.files.values():
        assert digests.of((path / record.path).read_bytes()) == record.digest
    assert verify_checkpoint(Store(), path) == []
    assert alike_tensors(read_checkpoint(Store(), path).tensors["model"], model)
    for name, at in (
        ("model.safetensors", -1),
        ("model.safetensors", CHUNK * 2),
        ("blob.bin", CHUNK + 5),
    ):
        with open(path / name, "r+b") as file:
            file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
            file.flush()
            assert name in verify_checkpoint(Store(), path)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte]))
    assert verify_checkpoint(Store(), path) == []
    assert set(threading.enumerate()) <= threads, "a thread is left"


class WritebackRanges:
    """Stands for the C library, and notes for which bytes of a file the writeback was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, bool]] = []

    def sync_file_range(self, handle, start, size, flags) -> int:
        written = os.fstat(handle).st_size == start.value + size.value
        self.asked.append((start.value, size.value, written))
        assert flags == 2
        return -1  # what it answers is not asked: the sync at the end promises durability


def test_a_large_file_begins_to_move_to_the_disk_while_it_is_written(tmp_path, monkeypatch):
    libc = WritebackRanges()
    monkeypatch.setattr(streams, "_LIBC", libc)
    model = {f"w{i}": torch.ones(5 << 18) for i in range(15)}  # 75 MiB
    path = write_checkpoint(Store(), tmp_path, only(model))
    ends = [start + size for start, size, _ in libc.asked]
    assert [start for start, _, _ in libc.asked] == [0, *ends[:-1]]
    assert all(size >= streams.WRITEBACK and written for _, size, written in libc.asked)
    assert len(libc.asked) == 2
    assert verify_checkpoint(Store(), path) == []


def test_systems_without_ranges_of_writeback_save_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_LIBC", None)
    path = write_checkpoint(Store(), tmp_path, only({"w": torch.ones(10 << 20)}))
    assert verify_checkpoint(Store(), path) == []


def test_a_run_that_resumes_from_an_older_checkpoint_detaches_the_newer_ones(tmp_path):
    store = Store()
    paths = [write_checkpoint(store, tmp_path, make(step)) for step in (1, 2, 3)]
    assert [path.name for path in detach_after(store, tmp_path, paths[0])] == [
        "step-000000000003.left-1",
        "step-000000000002.left-1",
    ]
    assert newest_valid(store, tmp_path) == paths[0]
    assert write_checkpoint(store, tmp_path, make(4, step=2)).name == "step-000000000002"
    assert alike(load_newest(store, tmp_path)[1], make(4, step=2))
    assert [path.name for path in detach_after(store, tmp_path, paths[0])] == [
        "step-000000000002.left-2"
    ]
    assert detach_after(store, tmp_path, paths[0]) == []
    with pytest.raises(OptionError, match="no checkpoint of"):
        detach_after(store, tmp_path, tmp_path / "elsewhere" / "step-000000000001")
