"""HFTask: a Task made of a transformers model and the data to train it on."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from loopkit.checkpoint.format import dump_json, load_json
from loopkit.errors import CheckpointError, DataError, LoopkitWarning, TaskError
from loopkit.interop.columns import (
    SelectColumns,
    accepted_columns,
    column_names,
    data_sets,
    drops_columns,
    padding_collate,
    select_columns,
    with_collate,
)
from loopkit.interop.labels import Labels, label_columns
from loopkit.interop.model_checks import check_precision, check_quantised, generated
from loopkit.interop.pretrained_files import build_model, build_tokenizer, pretrained_files
from loopkit.interop.state_dict_names import StateDictNames
from loopkit.keywords import checks_keywords
from loopkit.optim import AdamW, linear
from loopkit.task import Task

if TYPE_CHECKING:
    from loopkit.run import Run

BASE = "base.json"
"""The file of a checkpoint of adapters that identifies the model below them."""


@checks_keywords
class HFTask(Task):
    """Train a transformers model by its own loss; ``from_pretrained`` opens its checkpoints.

    A sample is a dict, such as a row of a ``datasets.Dataset``. The model is called with the
    columns that its ``forward`` names ("label" is passed as "labels"); a message names the other
    columns once. Losses over tokens are weighted by the number of labels that are not -100, so
    accumulation and several ranks are exact. A subclass may override any method, such as
    ``train_step`` for another loss.

    Examples:
        >>> model = AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased")
        >>> task = HFTask(model, train, eval, tokenizer=tokenizer)
        >>> Fit(epochs=3, precision="bf16").run(task)

    Args:
        model: a ``PreTrainedModel``, or one with peft adapters.
        train_data: samples to train on: a list of dicts, a ``datasets.Dataset``, a torch one, or a
            Loader over these; or batches: a DataLoader or another iterable.
        eval_data: as ``train_data``, or a dict of such by name.
        predict_data: as ``train_data``; None for ``eval_data``.
        tokenizer: gives the padding, and is saved with the model.
        collate_fn: makes a batch of a list of samples with all their columns. transformers' own
            collators, and classes derived from them, get the columns that the model accepts, as in
            the Trainer. None pads sequences to the longest one, and labels with -100.
        compute_metrics: a function of the ``outputs`` of a whole evaluation set (``preds``,
            ``target``) that returns numbers by name.
        metrics: metric objects by name; each evaluation uses a fresh copy.
        optimizers: a value that ``Task.optimizers`` may return, or a function of the task that
            returns one. None for the Trainer's default, AdamW with a rate that falls linearly from
            5e-5 to 0.
        loss_fn: a function of the model's output and the batch that returns the mean loss, in
            training and in evaluation. None for the model's own loss.
        generate: settings of ``model.generate``. If given, ``preds`` and predictions are the
            generated tokens instead of logits.
        label_names: the columns that are labels; None for those that the model's ``forward`` names.
        columns: the columns that the model is called with; None for all that its ``forward`` names.

    Attributes:
        model: the model itself. ``state_dict`` has its parameters under the model's own names.
        state_dict_names: renames the weights when they are saved and loaded.

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
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        generate: Mapping[str, Any] | None = None,
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
            loss_fn,
        )
        self._drop_hparams(kept)
        # from_pretrained leaves a model in eval mode.
        self.model, self.tokenizer = model.train(), tokenizer
        self._data = {"train": train_data, "eval": eval_data, "predict": predict_data}
        self._metrics, self._optimizers = metrics, optimizers
        if compute_metrics is not None:
            self.compute_metrics = compute_metrics  # type: ignore[method-assign, assignment]
        accepted = accepted_columns(self._base)
        known = label_columns(self._base)
        self._labels = Labels(self._base, known if label_names is None else label_names)
        self._loss_fn, self._generate = loss_fn, generate
        self._outputs: list[Any] | None = None
        if columns is None:
            columns = list(dict.fromkeys((*accepted, *self._labels.names)))
        self._columns = tuple(columns)
        # The cache serves generation alone.
        self._constants = {"use_cache": False} if "use_cache" in accepted else {}
        self._selects = collate_fn is None or drops_columns(collate_fn)
        if collate_fn is None:
            collate_fn = padding_collate(tokenizer, self._config, self._labels.names)
            collate_fn = SelectColumns(self._columns, collate_fn)
        elif self._selects:
            collate_fn = SelectColumns(self._columns, collate_fn, renames=False)
        self._collate = collate_fn
        self._reported: set[str] = set()
        _forbid_packing(model)
        self.state_dict_names = StateDictNames(self, model)
        self._files: dict[str, bytes] = {}

    def _drop_hparams(self, objects: Sequence[Any]) -> None:
        """Remove objects such as data, which may be large, from the recorded hyperparameters."""
        for name, value in list(self.hparams.items()):
            if any(value is each for each in objects if each is not None):
                del self.hparams[name]

    @property
    def _base(self) -> Any:
        """The model below the adapters; the model itself if it has none."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _config(self) -> Any:
        return getattr(self._base, "config", None)

    def train_step(self, batch: Any) -> Any:
        """Return the loss, and the number of labels that it averages.

        Raises:
            TaskError: the model gives no loss.
        """
        batch = self._cast(batch)
        out = self._call(batch)
        loss = out.get("loss") if self._loss_fn is None else self._loss_fn(out, batch)
        weight = self.weight(batch)
        if loss is None:
            raise TaskError(
                f"{type(self._base).__name__} gave no loss for a batch of {', '.join(batch)}: it "
                f"takes its labels as {' and '.join(self._labels.names) or 'nothing that it names'}"
                ". Give label_names= or loss_fn=, or define train_step"
            )
        return loss if weight is None else {"loss": loss, "weight": weight}

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        """Return the loss, ``preds`` (the logits, or generated tokens) and ``target`` (the labels).

        The loss is that of ``train_step`` if a class derives its own. ``target`` is a tuple if the
        model has several kinds of labels.
        """
        batch = self._cast(batch)
        labels = [batch[name] for name in self._labels.names if name in batch]
        # A model without columns of labels, such as an encoder, has its loss computed from inputs.
        found = self._measured(batch, bool(labels) or not self._labels.names)
        if labels:
            found["target"] = labels[0] if len(labels) == 1 else tuple(labels)
        return found

    def _measured(self, batch: Any, has_loss: bool) -> dict[str, Any]:
        """Return the predictions for ``batch``, its loss if there is one, and the loss's weight."""
        step: dict[str, Any] = {}
        if has_loss and self._has_own_step():
            # The values that the step logs are those of training.
            outputs: list[Any] = []
            self._outputs = outputs
            try:
                with self.log_collector:
                    result = self.train_step(batch)
            finally:
                self._outputs = None
            loss = result if isinstance(result, Tensor) else result["loss"]
            step = {"loss": loss.detach()}
            if not isinstance(result, Tensor) and "weight" in result:
                step["weight"] = result["weight"]
            # A step that calls the model twice, or another one, leaves the predictions open.
            out = outputs[0] if len(outputs) == 1 else self._call(batch)
        else:
            out = self._call(batch)
            weight = self.weight(batch)
            loss = out.get("loss")
            if self._loss_fn is not None and has_loss:
                loss = self._loss_fn(out, batch)
            step = {} if loss is None else {"loss": loss}
            step |= {} if weight is None else {"weight": weight}
        preds = _predictions(out) if self._generate is None else self._generated(batch)
        return {"preds": preds, **step}

    def _has_own_step(self) -> bool:
        return getattr(self.train_step, "__func__", None) is not HFTask.train_step

    def predict_step(self, batch: Any) -> Any:
        """Return the logits, or generated tokens."""
        batch = self._cast(batch)
        return _predictions(self._call(batch)) if self._generate is None else self._generated(batch)

    def _generated(self, batch: Mapping[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name in self._columns}
        return generated(self.model, inputs, self._generate or {}, self._labels.names)

    def _cast(self, batch: Any) -> Any:
        return self._labels.cast(batch) if isinstance(batch, Mapping) else batch

    def weight(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the number of labels that the loss of ``batch`` averages.

        Labels of -100 do not count, nor does the first label of each text for a causal language
        model.

        Returns:
            None if each sample counts once.
        """
        return self._labels.count(batch)

    def _call(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{type(self).__name__} got a batch that is a {type(batch).__name__}: give a dict "
                "of the model's arguments, by name"
            )
        inputs = {name: value for name, value in batch.items() if name in self._columns}
        if len(inputs) < len(batch):
            self._report_unused(batch.keys() - inputs.keys())
        out = self.model(**{**self._constants, **inputs})
        if not isinstance(out, Mapping):
            raise TaskError(
                f"{type(self._base).__name__} returned a {type(out).__name__}: HFTask reads a "
                "dict, such as transformers' ModelOutput (config.return_dict=True)"
            )
        self._labels.observe(batch, out)
        if self._outputs is not None:
            self._outputs.append(out)
        return out

    def _report_unused(self, columns: Collection[str]) -> None:
        """Print once, on rank 0, which columns the model is not called with."""
        new = sorted(set(columns) - self._reported)
        self._reported.update(new)
        if new and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            print(
                f"loopkit: {type(self._base).__name__} is called without the column(s) "
                f"{', '.join(new)}, which its forward does not name (columns= does)",
                file=sys.stderr,
            )

    def on_setup(self, run: Run) -> None:
        """Check the model, report unused columns, and make the files of checkpoints.

        So errors come before the first step.

        Raises:
            TaskError: a quantised model without adapters is to be trained.
            OptionError: the precision does not fit the weights.
        """
        if run.optimizers:
            check_quantised(self._base, self.state_dict_names.adapters)
            check_precision(self.model, run.options.precision)
        if run.checkpointer is not None:
            self.checkpoint_files()
        if self._selects:
            for part in ("train", "eval"):
                for data in data_sets(self._data[part]):
                    names = column_names(data)
                    self._report_unused(set(names) - set(select_columns(names, self._columns)))

    def metrics(self) -> Mapping[str, Any]:
        """Return a fresh copy of the metrics that were given."""
        return copy.deepcopy(dict(self._metrics or {}))

    def optimizers(self) -> Any:
        """Return the optimizers that were given, or the Trainer's default."""
        given = self._optimizers
        if given is None:
            return AdamW(lr=5e-5, weight_decay=0.0, schedule=linear())
        return given(self) if inspect.isroutine(given) else given

    def train_data(self) -> Any:
        """Return the training data, with the collate function."""
        if self._data["train"] is None:
            raise TaskError(
                f"{type(self).__name__} was given nothing to train on: give train_data="
            )
        return with_collate(self._data["train"], self._collate)

    def eval_data(self) -> Any:
        """Return the evaluation data, by name if there are several sets."""
        return self._with_collate("eval")

    def predict_data(self) -> Any:
        """Return the data to predict; the evaluation data if none was given."""
        return self._with_collate("eval" if self._data["predict"] is None else "predict")

    def _with_collate(self, part: str) -> Any:
        data = self._data[part]
        if isinstance(data, Mapping):
            return {name: with_collate(each, self._collate) for name, each in data.items()}
        return None if data is None else with_collate(data, self._collate)

    def checkpoint_files(self) -> Mapping[str, bytes]:
        """Return the model's configuration and the tokenizer, as ``save_pretrained`` writes them."""
        names = self.state_dict_names
        if not self._files:
            self._files = pretrained_files(self.model, self.tokenizer) if names.complete else {}
            if not names.complete:
                warnings.warn(
                    f"peft cannot open exports of these adapters ({', '.join(names.adapter_names)}): "
                    "it computes their weights when it saves them. Resume and load work",
                    LoopkitWarning,
                    stacklevel=2,
                )
            if names.adapters:
                self._files[BASE] = dump_json({"sha256": names.fingerprint})
        return self._files

    def check_files(self, files: Mapping[str, bytes], path: Path) -> None:
        """Refuse adapters that were trained on another model.

        Raises:
            CheckpointError: the frozen weights of that model are not exactly those of this one.
        """
        names = self.state_dict_names
        theirs = load_json(files[BASE], f"{path}/{BASE}")["sha256"] if BASE in files else ""
        if names.adapters and theirs and theirs != names.fingerprint:
            raise CheckpointError(
                f"{path} holds adapters of a model with frozen weights of SHA-256 {theirs[:12]}…, "
                f"and the frozen weights of this task have {names.fingerprint[:12]}…: build the "
                "same model, quantised the same way, before adapters are put on it"
            )

    @classmethod
    def _from_files(cls, files: Mapping[str, bytes], given: Collection[str]) -> dict[str, Any]:
        wanted = inspect.signature(cls.__init__).parameters.keys() - set(given)
        builders = {"model": build_model, "tokenizer": build_tokenizer}
        return {name: build(files) for name, build in builders.items() if name in wanted}


def _forbid_packing(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers in the format that has gradients.

    On CPUs with AVX512-BF16, the first evaluation packs the layers for inference. Later training
    steps raise no error, but no gradient flows through packed layers.
    """
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def _predictions(out: Any) -> Any:
    """Return the logits of a model's output; a tuple if several outputs are called logits."""
    names = ["logits"] if "logits" in out else [name for name in out if name.endswith("logits")]
    found = tuple(out[name] for name in names or [name for name in out if name != "loss"][:1])
    return found[0] if len(found) == 1 else found
