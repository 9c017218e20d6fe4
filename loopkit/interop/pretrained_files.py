"""The files beside the weights by which transformers and peft open them, and a model made from
these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from loopkit.checkpoint.format import load_json
from loopkit.checkpoint.tools import ADAPTERS
from loopkit.errors import CheckpointError

CONFIG = "config.json"
TOKENIZER = "tokenizer_config.json"


def files_of(model: Any, tokenizer: Any = None) -> dict[str, bytes]:
    """What ``save_pretrained`` of ``model`` and ``tokenizer`` would write beside the weights, by
    name.

    That is config.json, or for adapters adapter_config.json; generation_config.json; the
    tokenizer's files.
    """
    with TemporaryDirectory(prefix="loopkit-") as place:
        for part in (*_settings_of(model), tokenizer):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(place)
        found = sorted(path for path in Path(place).rglob("*") if path.is_file())
        return {path.relative_to(place).as_posix(): path.read_bytes() for path in found}


def _settings_of(model: Any) -> list[Any]:
    if hasattr(model, "peft_config"):
        settings = deepcopy(model.peft_config[model.active_adapter])
        settings.inference_mode = True  # as peft saves it: who opens it to go on training says so
        return [settings]
    if not hasattr(model, "config"):
        return []
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    writer = (
        getattr(model, "generation_config", None)
        if getattr(model, "can_generate", bool)()
        else None
    )
    return [config, writer]


def model_from(files: Mapping[str, bytes]) -> nn.Module:
    """A model of the class and the shape that config.json tells, with weights of chance.

    The class is looked up among transformers' own models; nothing else is imported by its name.

    Raises:
        CheckpointError: it cannot be made from the files alone.
    """
    import transformers

    if ADAPTERS in files:
        raise CheckpointError(
            "the checkpoint holds adapters and not the model below them: give the same one again, "
            "with adapters on it, as load(path, model=get_peft_model(...))"
        )
    name = str((load_json(files.get(CONFIG, b"{}"), CONFIG).get("architectures") or [""])[0])
    kind: Any = getattr(transformers, name, None) if name else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"the checkpoint's model is {name or 'of no class of transformers'}, which cannot be "
            "made from its files: give it again, as load(path, model=...)"
        )
    model: nn.Module = kind(_opened(transformers.AutoConfig, files))
    return model


def tokenizer_from(files: Mapping[str, bytes]) -> Any:
    """The tokenizer that the files hold; None for none."""
    from transformers import AutoTokenizer

    if TOKENIZER not in files:
        return None
    return _opened(AutoTokenizer, files)


def _opened(kind: Any, files: Mapping[str, bytes]) -> Any:
    """What ``kind.from_pretrained`` makes of the files, as they were verified in memory; it runs no
    code of theirs.
    """
    with TemporaryDirectory(prefix="loopkit-") as place:
        for name, data in files.items():
            path = Path(place, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            return kind.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{kind.__name__} cannot read the checkpoint's files: {error}"
            ) from error
