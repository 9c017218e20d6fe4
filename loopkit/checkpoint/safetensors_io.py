"""safetensors files, streamed: never built up in memory, read once and checked on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loopkit.checkpoint import digests
from loopkit.checkpoint.digests import Digest
from loopkit.checkpoint.format import dump_json, load_json
from loopkit.checkpoint.snapshot import Shard
from loopkit.checkpoint.streams import CHUNK, FileReader, FileWriter
from loopkit.errors import CheckpointError, CorruptCheckpointError

MAX_HEADER = 100_000_000
"""The most bytes of a header, as in the safetensors package."""

ALIGNED = 64
"""The alignment of tensors in a file in bytes, which is that of torch's own memory.

Sums over tensors that another program maps from the file are then equal to the last bit.
"""

_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
CODE_OF = {getattr(torch, name): code for name, code in _CODES.items() if hasattr(torch, name)}
"""torch dtype to safetensors code."""

DTYPE_OF = {code: dtype for dtype, code in CODE_OF.items()}
"""safetensors code to torch dtype."""


@dataclass(frozen=True)
class TensorSpec:
    """The dtype code, shape and digest that the manifest records for one tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file.

        Raises:
            CorruptCheckpointError: the dtype is unknown.
        """
        if self.dtype not in DTYPE_OF:
            raise CorruptCheckpointError(f"unknown dtype {self.dtype!a}")
        return math.prod(self.shape) * int(DTYPE_OF[self.dtype].itemsize)


def find_aliases(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Find names whose tensor is the same view of the same memory as an earlier name's.

    Args:
        tensors: by name. Of a Shard, the memory of this rank's part is compared.

    Returns:
        The later name to the earlier one.
    """
    first: dict[Any, str] = {}
    aliases = {}
    for name, value in tensors.items():
        tensor = value.tensor if isinstance(value, Shard) else value
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


def check_tensor(name: str, value: torch.Tensor | Shard) -> None:
    """Check that the format can hold a tensor.

    Raises:
        TypeError: it cannot; with the tensor's name.
    """
    tensor = value.tensor if isinstance(value, Shard) else value
    if tensor is None:
        return
    if tensor.dtype not in CODE_OF or tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name}: a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device} "
            "cannot be saved in a checkpoint"
        )


def header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """Return the bytes before the data, and the names in the order of the data.

    Raises:
        TypeError: the format cannot hold a tensor.
        ValueError: a name is reserved, or the header is too large.
    """
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be named '__metadata__'")
    order = sorted(tensors, key=lambda name: (-_alignment(tensors[name]), name))
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


def _alignment(tensor: torch.Tensor) -> int:
    """Return the largest power of two, up to ALIGNED, that divides the bytes of a tensor.

    Stored in falling order of this number, each tensor begins at a multiple of it, and so at a
    multiple of its item size.
    """
    size = tensor.numel() * tensor.dtype.itemsize
    return min(size & -size or ALIGNED, ALIGNED)


def data_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of the data, without the header."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def write_tensors(
    file: FileWriter, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, TensorSpec]:
    """Stream tensors into ``file``; ``metadata`` goes into the header beside ``format``.

    At most one tensor is copied at a time, and only if it is not contiguous or not on the CPU.
    """
    head, order = header(tensors, metadata)
    file.write(head)
    specs = {}
    for name in order:
        tensor = tensors[name].detach().cpu()
        view = _bytes_of(tensor.resolve_conj().resolve_neg().contiguous())
        digest = Digest(digests.CHUNK)
        file.write(view, digest)
        specs[name] = TensorSpec(CODE_OF[tensor.dtype], tuple(tensor.shape), digest.text)
    return specs


def read_tensors(
    file: FileReader, specs: Mapping[str, TensorSpec], keep: bool = True, maps: bool = False
) -> dict[str, torch.Tensor]:
    """Read and check all tensors of a file.

    Args:
        file: its tensors must be those of ``specs``, and fill the file exactly.
        specs: what the manifest records, by name.
        keep: return the tensors. False only checks them.
        maps: return memory-mapped tensors instead of copies.

    Raises:
        CorruptCheckpointError: naming the file and every tensor that is wrong.
        CheckpointError: there is not enough memory.
    """
    order = _read_header(file, specs)
    found: dict[str, torch.Tensor] = {}
    wrong = []
    for name in order:
        spec = specs[name]
        view = None
        if keep and not maps:
            found[name] = _allocate(file, name, spec)
            view = _bytes_of(found[name])
        digest = digests.like(spec.digest)
        _fill(file, spec.nbytes, view, digest)
        if digest.text != spec.digest:
            wrong.append(name)
    if wrong:
        raise CorruptCheckpointError(f"{file.path}: damaged in {_listed(wrong)}")
    return _mapped(file, specs, order) if keep and maps else found


def _mapped(
    file: FileReader, specs: Mapping[str, TensorSpec], order: list[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors, which fill the end of the file in ``order``, as views of one memory map."""
    view, found = file.map(), {}
    start = file.size - sum(specs[name].nbytes for name in order)
    for name in order:
        spec, dtype = specs[name], DTYPE_OF[specs[name].dtype]
        flat = None
        if spec.nbytes:
            flat = torch.frombuffer(view, dtype=torch.uint8, count=spec.nbytes, offset=start)
        if flat is None or start % dtype.itemsize:
            found[name] = torch.empty(spec.shape, dtype=dtype)
            if flat is not None:
                found[name].view(-1).view(torch.uint8).copy_(flat)
        else:
            found[name] = flat.view(dtype).view(spec.shape)
        start += spec.nbytes
    return found


def _fill(file: FileReader, size: int, view: memoryview | None, digest: Digest) -> None:
    """Read ``size`` bytes, into ``view`` if it is given, and into ``digest``."""
    if view is not None:
        file.read_into(view, digest)
        return
    for start in range(0, size, CHUNK):
        file.read_piece(min(CHUNK, size - start), digest)


def _allocate(file: FileReader, name: str, spec: TensorSpec) -> torch.Tensor:
    try:
        return torch.empty(spec.shape, dtype=DTYPE_OF[spec.dtype])
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{file.path}: no memory for tensor {name!a}, {spec.nbytes} bytes"
        ) from error


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _listed(names: list[str]) -> str:
    """Return "tensors 'a', 'b'", cut after five names."""
    shown = ", ".join(ascii(name) for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"tensor{'s' * (len(names) > 1)} {shown}{more}"


def _read_header(file: FileReader, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Read and check the header, and return the names in the order of the data."""
    where = str(file.path)
    if file.size < 8:
        raise CorruptCheckpointError(f"{where} ends early")
    start = bytearray(8)
    file.read_into(memoryview(start))
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise CorruptCheckpointError(
            f"{where}: its header would have {length} bytes, the file has {file.size}"
        )
    text = bytearray(length)
    file.read_into(memoryview(text))
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
    if 8 + length + end != file.size:
        raise CorruptCheckpointError(
            f"{where}: {file.size} bytes, its header says {8 + length + end}"
        )
    return order


def _check_entry(where: str, name: str, entry: Any, spec: TensorSpec) -> None:
    """Check one entry of a header, which may be any JSON value."""
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
    integers = all(type(number) is int and number >= 0 for number in numbers)
    if not same or len(entry) != 3 or not integers:
        raise CorruptCheckpointError(
            f"{where}: the header entry of tensor {name!a} is not that of the manifest"
        )
