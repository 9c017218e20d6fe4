"""HFTask: a Task made of a transformers model and the data to train it on."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from loopkit.checkpoint.format import dump_json, load_json
from loopkit.errors import CheckpointError, DataError, TaskError, missing_extra
from loopkit.interop.columns import (
    IGNORED,
    Selecting,
    accepted_by,
    chosen,
    columns_of,
    opened,
    padding,
    sets,
)
from loopkit.interop.pretrained_files import files_of, model_from, tokenizer_from
from loopkit.interop.state_dict_names import Names
from loopkit.keywords import checks_keywords
from loopkit.optim import AdamW, linear
from loopkit.task import Task

if TYPE_CHECKING:
    from loopkit.run import Run

BASE = "base.json"
"""What a checkpoint of adapters says of the model below them."""


@checks_keywords
class HFTask(Task):
    """Trains a transformers model by its own loss. Its checkpoints and exports open with
    ``from_pretrained``.

    A sample is a dict, such as a row of a ``datasets.Dataset``. The model is called with those
    columns that its ``forward`` names (a "label" is its "labels"); what is left out is said once.
    Losses over tokens are weighed by the number of labels that are not -100, so accumulation and
    several ranks are exact. A class derived from it may
    override any method: ``train_step`` for a loss of its own, ``optimizers``, ``metrics`` …

    Args:
        model: a ``PreTrainedModel``, or peft's adapters on one.
        train_data: samples to train on: a list of dicts, a ``datasets.Dataset``, a torch one, or a
            Loader over these; or batches: a DataLoader or another iterable.
        eval_data: as ``train_data``, or a dict of such by name.
        predict_data: as ``train_data``; None takes ``eval_data``.
        tokenizer: says how to pad, and is saved with the model.
        collate_fn: list of samples, whole ones, to batch; None pads sequences to the longest, labels
            with -100.
        compute_metrics: ``outputs`` of a whole evaluation set (``preds``, ``target``) to numbers by
            name.
        metrics: metric objects by name; each evaluation takes a fresh copy.
        optimizers: what ``Task.optimizers`` may return, or a function of the task that gives it;
            None for the Trainer's default, AdamW at 5e-5 that falls linearly to 0.
        label_names: the columns that are labels; None asks the model's ``forward``.
        columns: what the model is called with; None takes what its ``forward`` names.

    Attributes:
        model: the model itself; ``state_dict`` has its parameters under the model's own names.

    Raises:
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Any = None,
        eval_data: Any = None,
        predict_data: Any = None,
        *,
        tokenizer: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
        metrics: Mapping[str, Any] | None = None,
        optimizers: Any = None,
        label_names: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        kept = (
            model,
            train_data,
            eval_data,
            predict_data,
            tokenizer,
            collate_fn,
            compute_metrics,
            metrics,
            optimizers,
        )
        self._forget(kept)
        self.model, self.tokenizer = (
            model.train(),
            tokenizer,
        )  # from_pretrained leaves it in eval mode
        self._data = {"train": train_data, "eval": eval_data, "predict": predict_data}
        self._metrics, self._optimizers = metrics, optimizers
        if compute_metrics is not None:
            self.compute_metrics = compute_metrics  # type: ignore[method-assign, assignment]
        accepted = accepted_by(self._base)
        self._labels = tuple(_labels_of(self._base) if label_names is None else label_names)
        self._columns = (
            tuple(dict.fromkeys((*accepted, *self._labels))) if columns is None else tuple(columns)
        )
        self._always = (
            {"use_cache": False} if "use_cache" in accepted else {}
        )  # it serves generation alone
        self._shifts = _shifts(self._base)
        self._selects = collate_fn is None
        self._collate = collate_fn or Selecting(
            self._columns, padding(tokenizer, self._config, self._labels)
        )
        self._left_out: set[str] = set()
        _forbid_packing(model)
        self._names = Names(self, model)
        self._files: dict[str, bytes] = {}

    def _forget(self, objects: Sequence[Any]) -> None:
        """Leave out of the hyperparameters what is no value: data among it, which may be large."""
        for name, value in list(self.hparams.items()):
            if any(value is each for each in objects if each is not None):
                del self.hparams[name]

    @property
    def _base(self) -> Any:
        """The model below adapters; without them itself."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def _config(self) -> Any:
        return getattr(self._base, "config", None)

    def train_step(self, batch: Any) -> Any:
        """The model's own loss, and how many labels it is the mean over.

        Raises:
            TaskError: the model gives no loss.
        """
        out = self._call(batch)
        loss, weight = getattr(out, "loss", None), self.weight(batch)
        if loss is None:
            raise TaskError(
                f"{type(self._base).__name__} gave no loss for a batch of {', '.join(batch)}: it "
                f"takes its "
                f"labels as {' and '.join(self._labels) or 'nothing that it names'}. Give "
                f"label_names=, or "
                "define train_step"
            )
        return loss if weight is None else {"loss": loss, "weight": weight}

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        """The loss, ``preds`` (the logits) and ``target`` (the labels; a tuple where the model has
        several).
        """
        out, weight = self._call(batch), self.weight(batch)
        found: dict[str, Any] = {"preds": _predictions(out)}
        labels = [batch[name] for name in self._labels if name in batch]
        if labels:
            found["target"] = labels[0] if len(labels) == 1 else tuple(labels)
        if getattr(out, "loss", None) is not None:
            found["loss"] = out.loss
        return found if weight is None else {**found, "weight": weight}

    def predict_step(self, batch: Any) -> Any:
        """The logits."""
        return _predictions(self._call(batch))

    def weight(self, batch: Mapping[str, Any]) -> Tensor | None:
        """How many labels the loss of ``batch`` is the mean over; None where each sample counts
        once.

        Those of -100 are left out, and of a model that predicts what comes next the first of each
        text.
        """
        labels = [batch[name] for name in self._labels if name in batch]
        if (
            len(labels) != 1
            or not isinstance(labels[0], Tensor)
            or not labels[0].ndim
            or labels[0].is_floating_point()
        ):
            return None
        counted = labels[0][..., 1:] if labels[0].ndim > 1 and self._shifts else labels[0]
        return (counted != getattr(self._config, "semantic_loss_ignore_index", IGNORED)).sum()

    def _call(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{type(self).__name__} got a batch that is a {type(batch).__name__}: give a dict "
                f"of what "
                "the model is called with, by name"
            )
        inputs = {name: value for name, value in batch.items() if name in self._columns}
        if len(inputs) < len(batch):
            self._tell(batch.keys() - inputs.keys())
        out = self.model(**{**self._always, **inputs})
        if not isinstance(out, Mapping):
            raise TaskError(
                f"{type(self._base).__name__} returned a {type(out).__name__}: HFTask reads a "
                f"dict, such "
                "as transformers' ModelOutput (config.return_dict=True)"
            )
        return out

    def _tell(self, left_out: Collection[str]) -> None:
        """Say once, on the first rank, which columns the model is not called with."""
        new = sorted(set(left_out) - self._left_out)
        self._left_out.update(new)
        if new and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            print(
                f"loopkit: {type(self._base).__name__} is called without the column(s) "
                f"{', '.join(new)}, which its "
                "forward does not name (columns= does)",
                file=sys.stderr,
            )

    def on_setup(self, run: Run) -> None:
        """Say what is left out of the data; and find out now, not at the first save, whether all
        can be saved.
        """
        if run.checkpointer is not None:
            self.checkpoint_files()
        if self._selects:
            for data in (each for part in ("train", "eval") for each in sets(self._data[part])):
                there = columns_of(data)
                self._tell(set(there) - set(chosen(there, self._columns)))

    def metrics(self) -> Mapping[str, Any]:
        """A fresh copy of the metrics given."""
        return copy.deepcopy(dict(self._metrics or {}))

    def optimizers(self) -> Any:
        """What was given, or the Trainer's default."""
        given = self._optimizers
        if given is None:
            return AdamW(lr=5e-5, weight_decay=0.0, schedule=linear())
        return given(self) if inspect.isroutine(given) else given

    def train_data(self) -> Any:
        """The samples to train on, joined by the collate function."""
        if self._data["train"] is None:
            raise TaskError(
                f"{type(self).__name__} was given nothing to train on: give train_data="
            )
        return opened(self._data["train"], self._collate)

    def eval_data(self) -> Any:
        """The samples to evaluate on, by name where there are several sets."""
        return self._opened("eval")

    def predict_data(self) -> Any:
        """The samples to predict; those to evaluate on where none were given."""
        return self._opened("eval" if self._data["predict"] is None else "predict")

    def _opened(self, part: str) -> Any:
        data = self._data[part]
        if isinstance(data, Mapping):
            return {name: opened(each, self._collate) for name, each in data.items()}
        return None if data is None else opened(data, self._collate)

    def checkpoint_files(self) -> Mapping[str, bytes]:
        """The model's configuration and the tokenizer, as ``save_pretrained`` writes them."""
        if not self._files:
            self._files = files_of(self.model, self.tokenizer) if self._names.complete else {}
            if self._names.adapters:
                self._files[BASE] = dump_json({"sha256": self._names.fingerprint})
        return self._files

    def check_files(self, files: Mapping[str, bytes], path: Path) -> None:
        """Refuse adapters that were trained on another model.

        Raises:
            CheckpointError: the model below them is not, bit for bit, the one below ours.
        """
        there = load_json(files[BASE], f"{path}/{BASE}")["sha256"] if BASE in files else ""
        if self._names.adapters and there and there != self._names.fingerprint:
            raise CheckpointError(
                f"{path} holds adapters of a model whose frozen weights have SHA-256 "
                f"{there[:12]}…, "
                f"and those of this task's have {self._names.fingerprint[:12]}…: build the same "
                "one, quantised the same way, before adapters are put on it"
            )

    @classmethod
    def _from_files(cls, files: Mapping[str, bytes], given: Collection[str]) -> dict[str, Any]:
        wanted = inspect.signature(cls.__init__).parameters.keys() - set(given)
        makers = {"model": model_from, "tokenizer": tokenizer_from}
        return {name: make(files) for name, make in makers.items() if name in wanted}


def _forbid_packing(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers in the form that has gradients.

    On CPUs with AVX512-BF16 a first evaluation packs them for inference; a later step trains on
    without an error, but no gradient goes through them any more.
    """
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def _labels_of(model: nn.Module) -> list[str]:
    try:
        from transformers.utils import find_labels
    except ImportError as error:
        raise missing_extra("transformers", "hf", "HFTask") from error
    return list(find_labels(type(model)))


def _shifts(model: Any) -> bool:
    """Whether the model's loss compares each place with the label of the next."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    causal = {kind.__name__ for kind in type(model).__mro__} & {*CAUSAL.values()}
    return bool(causal) or getattr(model, "loss_type", None) in (
        "ForCausalLM",
        "ForConditionalGeneration",
    )


def _predictions(out: Any) -> Any:
    """The logits of a model's output; a tuple of all that it calls so, where there are several."""
    names = ["logits"] if "logits" in out else [name for name in out if name.endswith("logits")]
    found = tuple(out[name] for name in names or [name for name in out if name != "loss"][:1])
    return found[0] if len(found) == 1 else found
