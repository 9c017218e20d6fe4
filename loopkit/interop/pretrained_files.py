"""The files that transformers and peft open beside the weights, and a model built from them."""

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
from loopkit.interop.state_dict_names import active_adapters

CONFIG = "config.json"
TOKENIZER = "tokenizer_config.json"


def pretrained_files(model: Any, tokenizer: Any = None) -> dict[str, bytes]:
    """Return the files that ``save_pretrained`` writes beside the weights, by name.

    These are config.json (of adapters adapter_config.json), generation_config.json and the files of
    the tokenizer.
    """
    with TemporaryDirectory(prefix="loopkit-") as directory:
        for folder, part in (*_configs(model), ("", tokenizer)):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(Path(directory, folder))
        found = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def _configs(model: Any) -> list[tuple[str, Any]]:
    """Return the configurations to save with a model, each with its folder."""
    if hasattr(model, "peft_config"):
        adapters = active_adapters(model)
        return [(n if len(adapters) > 1 else "", _adapter_config(model, n)) for n in adapters]
    if not hasattr(model, "config"):
        return []
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    can_generate = getattr(model, "can_generate", bool)()
    return [("", config), ("", getattr(model, "generation_config", None) if can_generate else None)]


def _adapter_config(model: Any, adapter: str) -> Any:
    config = deepcopy(model.peft_config[adapter])
    # peft saves adapters so. To train on, the user loads them with is_trainable=True.
    config.inference_mode = True
    return config


def build_model(files: Mapping[str, bytes]) -> nn.Module:
    """Build the model that config.json describes, with random weights.

    Its class is looked up among transformers' own models. Nothing else is imported by its name.

    Raises:
        CheckpointError: the files are not enough to build it.
    """
    import transformers

    if any(name.rpartition("/")[2] == ADAPTERS for name in files):
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
    model: nn.Module = kind(_from_files(transformers.AutoConfig, files))
    return model


def build_tokenizer(files: Mapping[str, bytes]) -> Any:
    """Build the tokenizer that the files describe; None if there is none."""
    from transformers import AutoTokenizer

    if TOKENIZER not in files:
        return None
    return _from_files(AutoTokenizer, files)


def _from_files(kind: Any, files: Mapping[str, bytes]) -> Any:
    """Call ``kind.from_pretrained`` on files that were verified in memory; their code is not run."""
    with TemporaryDirectory(prefix="loopkit-") as directory:
        for name, data in files.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{kind.__name__} cannot read the checkpoint's files: {error}"
            ) from error
