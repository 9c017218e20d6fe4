"""Run as a program: reads hostile checkpoints under an audit hook and a memory limit, prints what
happened.

Arguments: how many random mutations, the seed.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

import torch
from snapshots import alike, make

from loopkit.checkpoint import (
    Snapshot,
    Store,
    digests,
    load_newest,
    newest_valid,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from loopkit.checkpoint.format import dump_json
from loopkit.checkpoint.manifest import checksum
from loopkit.errors import CheckpointError, CorruptCheckpointError

HARMLESS = (
    "object.",
    "builtins.id",
    "sys._getframe",
    "marshal",
    "gc.",
    "cpython._PySys_ClearAuditHooks",
    "code.__new__",
)
FILES_OPS = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "os.truncate",
    "os.chmod",
)
violations: list[str] = []
inside = ""
armed = False


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not armed or event.startswith(HARMLESS) or event in FILES_OPS:
        return
    if event == "open":
        path = arguments[0]
        # Below a checkpoint files are opened by one name, relative to an open directory.
        if isinstance(path, int) or (
            isinstance(path, str) and (path.startswith(inside) or "/" not in path)
        ):
            return
    violations.append(f"{event} {arguments!r}"[:200])


class Boom:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {inside}/executed",)


def forge(
    path: Path, file: str, data: bytes, change: Callable[[dict[str, Any]], object] | None = None
) -> None:
    """Put ``data`` into a file and make the manifest agree, as somebody who knows the format would."""
    (path / file).write_bytes(data)
    raw = json.loads((path / "MANIFEST.json").read_text())
    for record in raw["files"]:
        if record["path"] == file:
            record.update(size=len(data), digest=digests.of(data))
    if change is not None:
        change(raw)
    seal(path, raw)


def seal(path: Path, raw: dict[str, Any]) -> None:
    raw["checksum"] = checksum(raw)
    (path / "MANIFEST.json").write_bytes(dump_json(raw))


def state(value: Any) -> Callable[[Path], None]:
    return lambda path: forge(path, "state.json", json.dumps(value).encode())


def header(
    change: Callable[[dict[str, Any]], object], data: bytes | None = None
) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        old = (path / "model.safetensors").read_bytes()
        size = int.from_bytes(old[:8], "little")
        fields = json.loads(old[8 : 8 + size])
        changed = change(fields)
        text = changed if isinstance(changed, bytes) else json.dumps(fields).encode()
        body = old[8 + size :] if data is None else data
        forge(path, "model.safetensors", struct.pack("<Q", len(text)) + text + body)

    return act


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        raw = json.loads((path / "MANIFEST.json").read_text())
        change(raw)
        seal(path, raw)

    return act


def sparse(path: Path, file: str, size: int, agree: bool) -> None:
    with open(path / file, "r+b") as handle:
        handle.truncate(size)
    if agree:
        manifest(lambda m: [f.update(size=size) for f in m["files"] if f["path"] == file])(path)


def link(target: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        (path / "config.json").unlink()
        (path / "config.json").symlink_to(target)

    return act


def link_folder(path: Path) -> None:
    shutil.move(path / "tokenizer", path.parent / "elsewhere")
    (path / "tokenizer").symlink_to(path.parent / "elsewhere")


def escape(name: str) -> Callable[[Path], None]:
    def change(raw: dict[str, Any]) -> None:
        secret = (Path(inside) / "secret").read_bytes()
        raw["files"].append({"path": name, "size": len(secret), "digest": digests.of(secret)})

    return manifest(change)


def entry(**fields: Any) -> Callable[[Path], None]:
    return header(lambda h: h["bias"].update(fields))


DEEP = b"[" * 200_000 + b"]" * 200_000
FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.safetensors",
    "state.json",
    "config.json",
    "MANIFEST.json",
]
HUGE = 1 << 40


def claim_huge(path: Path) -> None:
    """A sparse terabyte on which file, header and manifest agree."""
    text = json.dumps({"w": {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}).encode()
    with open(path / "model.safetensors", "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + HUGE)
    chunk = {"file": "model.safetensors", "offset": [0], "shape": [HUGE], "digest": "xxh3-64:0"}

    def change(raw: dict[str, Any]) -> None:
        raw["tensors"]["model"] = {"w": {"dtype": "U8", "shape": [HUGE], "chunks": [chunk]}}
        raw["aliases"] = {}
        raw["files"][0].update(size=8 + len(text) + HUGE)

    manifest(change)(path)


CASES: dict[str, Callable[[Path], object]] = {
    **{f"pickle as {f}": lambda p, f=f: (p / f).write_bytes(pickle.dumps(Boom())) for f in FILES},
    **{
        f"pickle as {f}, agreed": lambda p, f=f: forge(p, f, pickle.dumps(Boom()))
        for f in FILES[:4]
    },
    "torch.save as model": lambda p: forge(
        p, "model.safetensors", (Path(inside) / "evil.pt").read_bytes()
    ),
    "class name": state({"$class": "os.system"}),
    "reduce": state({"$reduce": ["os.system", ["x"]]}),
    "python object": state({"a": {"$import": "antigravity"}}),
    "dtype": state({"a": {"$dtype": "os.system"}}),
    "device": state({"a": {"$device": "__import__('os').system('x')"}}),
    "path kind": state({"a": {"$path": ["subprocess.Popen", "x"]}}),
    "numpy dtype": state({"a": {"$scalar": ["O8", "0000000000000000"]}}),
    "numpy record": state({"a": {"$scalar": ["{'names':['a'],'formats':['O']}", "00"]}}),
    "tensor missing": state({"a": {"$tensor": "../../secret"}}),
    "tensor twice": state({"a": {"$tensor": "rng"}, "b": {"$tensor": "rng"}}),
    "deep state": lambda p: forge(p, "state.json", DEEP),
    "deep state of objects": lambda p: forge(
        p, "state.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    ),
    "deep but legal JSON": lambda p: forge(
        p, "state.json", b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"
    ),
    "state is a list": lambda p: forge(p, "state.json", b"[]"),
    "key twice": lambda p: forge(p, "state.json", b'{"a":1,"a":2}'),
    "NaN": lambda p: forge(p, "state.json", b'{"a":NaN}'),
    "huge number": lambda p: forge(p, "state.json", b'{"a":' + b"9" * 100_000 + b"}"),
    "not UTF-8": lambda p: forge(p, "state.json", b'{"a":"\xff"}'),
    "deep manifest": lambda p: (p / "MANIFEST.json").write_bytes(DEEP),
    "deep header": header(lambda h: DEEP),
    "deep metadata": header(lambda h: b'{"__metadata__":' + DEEP + b"}"),
    "parent folder": escape("../../secret"),
    "parent folder inside": escape("tokenizer/../../../secret"),
    "absolute": escape("/etc/hostname"),
    "backslash": escape("..\\secret"),
    "NUL": escape("secret\0"),
    "link out": link("../../secret"),
    "link absolute": link("/etc/hostname"),
    "link to itself": link("config.json"),
    "link to a device": link("/dev/zero"),
    "folder is a link": link_folder,
    "header length": lambda p: forge(p, "model.safetensors", b"\xff" * 8 + b"{}"),
    "header length of a terabyte": lambda p: forge(
        p, "model.safetensors", struct.pack("<Q", 1 << 40) + b"{}"
    ),
    "header beyond the file": lambda p: forge(
        p, "model.safetensors", struct.pack("<Q", 100) + b"{}"
    ),
    "empty file": lambda p: forge(p, "model.safetensors", b""),
    "header not an object": header(lambda h: b"[]"),
    "header key twice": header(lambda h: b'{"a":1,"a":1}'),
    "entry not an object": header(lambda h: h.update(bias=3)),
    "entry with more": entry(extra=1),
    "negative shape": entry(shape=[-7]),
    "huge shape": entry(shape=[1 << 62]),
    "float shape": entry(shape=[7.0]),
    "true shape": entry(shape=[True]),
    "shape missing": header(lambda h: h["bias"].pop("shape")),
    "negative offset": entry(data_offsets=[-14, 0]),
    "huge offset": entry(data_offsets=[1 << 62, (1 << 62) + 14]),
    "overlap": entry(data_offsets=[0, 14]),
    "dtype wider": entry(dtype="F64"),
    "dtype unknown": entry(dtype="os.system"),
    "data missing": header(lambda h: None, data=b""),
    "data doubled": lambda p: header(lambda h: None, data=bytes(4096))(p),
    "manifest of lists": manifest(lambda m: m.update(tensors=[], files={}, aliases=3)),
    "manifest step text": manifest(lambda m: m.update(step="1; import os")),
    "manifest huge step": manifest(lambda m: m.update(step=1 << 80)),
    "manifest chunk bomb": manifest(
        lambda m: m["tensors"]["model"]["bias"].update(
            chunks=[
                {"file": "model.safetensors", "offset": [0], "shape": [0], "digest": "xxh3-64:0"}
            ]
            * 100_000
        )
    ),
    "manifest shape of 10,000 dimensions": manifest(
        lambda m: m["tensors"]["model"]["bias"].update(shape=[1] * 10_000)
    ),
    "alias of itself": manifest(lambda m: m["aliases"]["model"].update(a="a")),
    "alias that is a list": manifest(lambda m: m["aliases"]["model"].update(a=["a"])),
    **{f"sparse {f}": lambda p, f=f: sparse(p, f, HUGE, False) for f in FILES},
    **{f"sparse {f}, agreed": lambda p, f=f: sparse(p, f, HUGE, True) for f in FILES[:5]},
    "a terabyte that is agreed on": claim_huge,
}


def main(mutations: int, seed: int) -> None:
    global inside, armed
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as name:
        inside = os.path.realpath(name)
        base = Path(inside)
        (base / "secret").write_bytes(b"secret")
        torch.save({"a": Boom()}, base / "evil.pt")
        run_dir = base / "run"
        run_dir.mkdir()
        path = write_checkpoint(Store(), run_dir, make(1))
        keep = base / "keep"
        shutil.copytree(path, keep)
        # Once before, so that what is imported late is imported.
        reading(run_dir, path)
        soft = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (
            600 << 20
        )
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        sys.addaudithook(audit)
        armed = True
        pickle.loads(pickle.dumps(print))
        armed = False
        assert any("find_class" in each for each in violations), "the hook sees nothing"
        violations.clear()
        results: dict[str, Any] = {"cases": {}, "mutations": 0, "read": 0}
        for case, damage in CASES.items():
            fresh(keep, path)
            damage(path)
            results["cases"][case] = attempt(
                run_dir, path, skip_verify=case.startswith("a terabyte")
            )
        made = random.Random(seed)
        for _ in range(mutations):
            fresh(keep, path)
            forged = mutate(made, path)
            outcome = attempt(run_dir, path)
            results["mutations"] += 1
            if outcome == "read":
                results["read"] += 1
                assert forged, "a change that was not covered up went through"
        assert not (base / "executed").exists()
        results["violations"] = violations
        print(json.dumps(results))


def fresh(keep: Path, path: Path) -> None:
    for each in path.parent.iterdir():
        if each.is_symlink() or each.is_file():
            each.unlink()
        else:
            shutil.rmtree(each)
    shutil.copytree(keep, path)


def reading(run_dir: Path, path: Path) -> Snapshot:
    verify_checkpoint(Store(), path)
    load_newest(Store(), run_dir, warn=lambda text: None, quarantine=False)
    return read_checkpoint(Store(), path)


def attempt(run_dir: Path, path: Path, skip_verify: bool = False) -> str:
    """Return "read", or the class and text of a ``CheckpointError``; other errors are raised."""
    global armed
    armed = True
    try:
        problems = [] if skip_verify else verify_checkpoint(Store(), path)
        try:
            newest = (
                None
                if skip_verify
                else newest_valid(Store(), run_dir, warn=lambda text: None, quarantine=False)
            )
        except CheckpointError:
            newest = None
        assert bool(problems) == (newest is None) or skip_verify
        got = read_checkpoint(Store(), path)
        assert not problems, problems
        assert isinstance(got, Snapshot)
        return "read"
    except CheckpointError as error:
        return f"{'corrupt' if isinstance(error, CorruptCheckpointError) else 'refused'}: {error}"
    finally:
        armed = False


def mutate(made: random.Random, path: Path) -> bool:
    """Change a file at random; whether the manifest was made to agree."""
    if made.random() < 0.3:
        raw = json.loads((path / "MANIFEST.json").read_text())
        junk(made, raw)
        seal(path, raw)
        return True
    file = made.choice(FILES)
    old = (path / file).read_bytes()
    data = bytearray(old)
    while data == old:
        at = made.randrange(len(data) + 1)
        kind = made.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([made.randrange(256)])
        elif kind == 1:
            data[at:at] = made.randbytes(made.randrange(1, 9))
        elif kind == 2:
            del data[at : at + made.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = data[made.randrange(len(data) + 1) :][:64]
        else:
            data[at : at + 8] = made.choice(
                [b"\xff" * 8, bytes(8), b"[[[[[[[[", b'{"$set":', b"-1e99999"]
            )
    if file == "MANIFEST.json" or made.random() < 0.3:
        (path / file).write_bytes(data)
        return False
    forge(path, file, bytes(data))
    return True


def junk(made: random.Random, node: Any) -> None:
    """Put something else somewhere into JSON data."""
    while isinstance(node, dict | list) and node:
        key = made.choice(list(node)) if isinstance(node, dict) else made.randrange(len(node))
        if made.random() < 0.3 or not isinstance(node[key], dict | list) or not node[key]:
            values = [
                None,
                True,
                -1,
                0,
                1,
                1 << 70,
                1.5,
                "",
                "../x",
                "model.safetensors",
                [],
                {},
                [1],
                {"$int": "1"},
            ]
            node[key] = made.choice(values)
            if isinstance(node, dict) and made.random() < 0.2:
                del node[key]
            return
        node = node[key]


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert alike(make(1), make(1))
    main(int(sys.argv[1]), int(sys.argv[2]))
