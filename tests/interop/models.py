"""Small transformers models, a tokenizer, and data to train them on: all made here, nothing is
downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = 40
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForSequenceClassification": ("BertConfig", SMALL | {"num_labels": 3}),
    "BertForTokenClassification": ("BertConfig", SMALL | {"num_labels": 3}),
    "BertForMaskedLM": ("BertConfig", SMALL),
    "BertForQuestionAnswering": ("BertConfig", SMALL),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **TOKENS}),
    "LlamaForCausalLM": ("LlamaConfig", SMALL | TOKENS),
    "T5ForConditionalGeneration": (
        "T5Config", {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "ViTForImageClassification": (
        "ViTConfig", SMALL | {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3},
    ),
}  # fmt: skip


def made(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A model of the class, always the same one."""
    torch.manual_seed(seed)
    config, small = KINDS[kind]
    return getattr(transformers, kind)(
        getattr(transformers, config)(vocab_size=VOCABULARY, **small | settings)
    )


def samples(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of different lengths with labels as the class wants them, and a column that no model
    takes; images for ViT.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind.startswith("ViT"):
        images = torch.randn(count, 1, 8, 8, generator=generator)
        labels = images[:, 0, :3, 0].argmax(1).tolist()
        return [
            {"pixel_values": image, "text": "…", "labels": label}
            for image, label in zip(images, labels)
        ]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for _ in range(count):
        # Over start and end the softmax takes in padding: the loss of a text depends on the longest
        # beside it.
        length = 10 if kind.endswith("QuestionAnswering") else number(3, 12)
        ids = [number(3, VOCABULARY) for _ in range(length)]
        labels: Any = [token if number(0, 3) else -100 for token in ids]
        if kind.endswith("SequenceClassification"):
            labels = max(ids) % 3
        elif kind.endswith("TokenClassification"):
            labels = [label % 3 if label >= 0 else label for label in labels]
        elif kind.startswith("T5"):
            labels = [3 + token % 20 for token in ids[: number(2, 5)]]
        sample = {"input_ids": ids, "text": "…", "labels": labels}
        if kind.endswith("QuestionAnswering"):
            del sample["labels"]
            sample |= {"start_positions": number(0, len(ids)), "end_positions": number(0, len(ids))}
        found.append(sample)
    return found


def tokenizer() -> Any:
    """A tokenizer of words."""
    words = {
        word: i
        for i, word in enumerate(
            ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "a", "very"]
        )
    }
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
