"""safetensors files, streamed: never built in memory, read once and checked on the way."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loopkit.checkpoint.format import Shard, dump_json, load_json
from loopkit.checkpoint.streams import CHUNK, FileReader, FileWriter
from loopkit.errors import CheckpointError, CorruptCheckpointError

MAX_HEADER = 100_000_000
"""Bytes; the limit that the safetensors package has."""

ALIGNED = 64
"""Bytes; where torch's memory begins. Sums over what others map from a file are then the same, to the last bit."""

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
CODE_OF = {getattr(torch, name): code for name, code in _CODES.items() if hasattr(torch, name)}
"""torch dtype to safetensors code."""
DTYPE_OF = {code: dtype for dtype, code in CODE_OF.items()}


@dataclass(frozen=True)
class Spec:
    """What the manifest says of one tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def nbytes(self) -> int:
        """Size in the file; ``CorruptCheckpointError`` for an unknown dtype."""
        if self.dtype not in DTYPE_OF:
            raise CorruptCheckpointError(f"unknown dtype {self.dtype!a}")
        return math.prod(self.shape) * int(DTYPE_OF[self.dtype].itemsize)


def find_aliases(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Names whose tensor is the memory of an earlier name, seen the same way: name to that earlier
    name.

    For parts of tensors, by the memory of this rank's part.
    """
    first: dict[Any, str] = {}
    aliases = {}
    for name, held in tensors.items():
        tensor = held.tensor if isinstance(held, Shard) else held
        if tensor is None or tensor.layout is not torch.strided or not tensor.numel():
            continue
        key = (
            tensor.device,
            tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.is_conj(),
        )
        canonical = first.setdefault(key, name)
        if canonical != name:
            aliases[name] = canonical
    return aliases


def check(name: str, held: torch.Tensor | Shard) -> None:
    """``TypeError`` naming a tensor that the format cannot hold."""
    tensor = held.tensor if isinstance(held, Shard) else held
    if tensor is None:
        return
    if tensor.dtype not in CODE_OF or tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name}: a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device} cannot be "
            f"saved in a checkpoint"
        )


def header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The bytes before the data, and the names in the order of the data. ``TypeError`` as
    :func:`check`.
    """
    for name, tensor in tensors.items():
        check(name, tensor)
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be named '__metadata__'")
    order = sorted(tensors, key=lambda name: (-_evenness(tensors[name]), name))
    fields: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.dtype.itemsize
        fields[name] = {
            "dtype": CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = dump_json(fields, sort=False)
    text += b" " * (-(8 + len(text)) % ALIGNED)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"{len(tensors)} tensors need a header of {len(text)} bytes; {MAX_HEADER} is the limit"
        )
    return len(text).to_bytes(8, "little") + text, order


def _evenness(tensor: torch.Tensor) -> int:
    """The power of two that a tensor's size in bytes is a multiple of, up to ALIGNED.

    In falling order of it each tensor begins at a multiple of it, and so of its item size too.
    """
    size = tensor.numel() * tensor.dtype.itemsize
    return min(size & -size or ALIGNED, ALIGNED)


def data_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of data, without the header."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def write(
    sink: FileWriter, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, Spec]:
    """Stream tensors into ``sink``; ``metadata`` goes into the header beside ``format``.

    At most one tensor is copied at a time, and only when it is not contiguous or not on the CPU.
    """
    head, order = header(tensors, metadata)
    sink.write(head)
    specs = {}
    for name in order:
        tensor = tensors[name].detach().cpu()
        view = _bytes_of(tensor.resolve_conj().resolve_neg().contiguous())
        crc = 0
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            crc = zlib.crc32(piece, crc)
            sink.write(piece)
        specs[name] = Spec(CODE_OF[tensor.dtype], tuple(tensor.shape), crc)
    return specs


def read(
    source: FileReader, specs: Mapping[str, Spec], keep: bool = True, maps: bool = False
) -> dict[str, torch.Tensor]:
    """All tensors of a file into fresh memory, or as maps of it; with ``keep=False`` they are
    checked and dropped.

    The header must say what ``specs`` says and tile the file exactly. Raises
    ``CorruptCheckpointError`` naming the file and every tensor that is wrong, ``CheckpointError``
    when the memory does not suffice.
    """
    order = _read_header(source, specs)
    found: dict[str, torch.Tensor] = {}
    wrong = []
    for name in order:
        spec = specs[name]
        view = None
        if keep and not maps:
            found[name] = _allocate(source, name, spec)
            view = _bytes_of(found[name])
        if _fill(source, spec.nbytes, view) != spec.crc32:
            wrong.append(name)
    if wrong:
        raise CorruptCheckpointError(f"{source.path}: damaged in {_listed(wrong)}")
    return _mapped(source, specs, order) if keep and maps else found


def _mapped(
    source: FileReader, specs: Mapping[str, Spec], order: list[str]
) -> dict[str, torch.Tensor]:
    """The tensors in the order in which they fill the end of the file, each a view of a map of it."""
    view, found = source.map(), {}
    start = source.size - sum(specs[name].nbytes for name in order)
    for name in order:
        spec, dtype = specs[name], DTYPE_OF[specs[name].dtype]
        flat = (
            torch.frombuffer(view, dtype=torch.uint8, count=spec.nbytes, offset=start)
            if spec.nbytes
            else None
        )
        if flat is None or start % dtype.itemsize:
            found[name] = torch.empty(spec.shape, dtype=dtype)
            if flat is not None:
                found[name].view(-1).view(torch.uint8).copy_(flat)
        else:
            found[name] = flat.view(dtype).view(spec.shape)
        start += spec.nbytes
    return found


def _fill(source: FileReader, size: int, view: memoryview | None) -> int:
    """Read ``size`` bytes into ``view``, or nowhere; their CRC-32."""
    crc = 0
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        if view is None:
            piece = source.read_piece(count)
        else:
            piece = view[start : start + count]
            source.read_into(piece)
        crc = zlib.crc32(piece, crc)
    return crc


def _allocate(source: FileReader, name: str, spec: Spec) -> torch.Tensor:
    try:
        return torch.empty(spec.shape, dtype=DTYPE_OF[spec.dtype])
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{source.path}: no memory for tensor {name!a}, {spec.nbytes} bytes"
        ) from error


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _listed(names: list[str]) -> str:
    shown = ", ".join(ascii(name) for name in names[:5])
    return f"tensor{'s' if len(names) > 1 else ''} {shown}" + (
        f" and {len(names) - 5} more" if names[5:] else ""
    )


def _read_header(source: FileReader, specs: Mapping[str, Spec]) -> list[str]:
    where = str(source.path)
    if source.size < 8:
        raise CorruptCheckpointError(f"{where} ends early")
    start = bytearray(8)
    source.read_into(memoryview(start))
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER, source.size - 8):
        raise CorruptCheckpointError(
            f"{where}: its header would have {length} bytes, the file has {source.size}"
        )
    text = bytearray(length)
    source.read_into(memoryview(text))
    fields = load_json(text, f"{where}, header")
    if type(fields) is not dict:
        raise CorruptCheckpointError(f"{where}: its header is not an object")
    fields.pop("__metadata__", None)
    if set(fields) != set(specs):
        names = sorted(set(fields) ^ set(specs))
        raise CorruptCheckpointError(
            f"{where}: its header and the manifest differ in {_listed(names)}"
        )
    for name, entry in fields.items():
        _check_entry(where, name, entry, specs[name])
    order = sorted(fields, key=lambda name: tuple(fields[name]["data_offsets"]))
    end = 0
    for name in order:
        if fields[name]["data_offsets"][0] != end:
            raise CorruptCheckpointError(
                f"{where}: tensor {name!a} does not start where the one before ends"
            )
        end = fields[name]["data_offsets"][1]
    if 8 + length + end != source.size:
        raise CorruptCheckpointError(
            f"{where}: {source.size} bytes, its header says {8 + length + end}"
        )
    return order


def _check_entry(where: str, name: str, entry: Any, spec: Spec) -> None:
    try:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        same = (
            entry["dtype"] == spec.dtype
            and tuple(shape) == spec.shape
            and end - begin == spec.nbytes
        )
    except (TypeError, KeyError, ValueError, CorruptCheckpointError):
        same, numbers = False, []
    if (
        not same
        or len(entry) != 3
        or any(type(number) is not int or number < 0 for number in numbers)
    ):
        raise CorruptCheckpointError(
            f"{where}: the header entry of tensor {name!a} is not that of the manifest"
        )
