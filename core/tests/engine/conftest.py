"""Small tokenizers, made here: one of each kind that generative models use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from dovetail.engine.tokenizer import Tokenizer

CORPUS = [
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "The wolf said: what big eyes you have! What big teeth you have, grandmother?",
    "def main():\n    print('hello world')\n\treturn 0\n",
    "Größe, naïve café, 日本語 テキスト, привет мир, 🙂🙃 ok ok.",
] * 4

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

DEMO = Path(__file__).parents[3] / "plugins/models/src/dovetail_models/checkpoints/fable-4m"


def write(folder: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    """Write a checkpoint folder's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def bos_first() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with a beginning-of-sequence token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            show_progress=False,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.add_special_tokens(["<|user|>", "<|assistant|>"])
    backend.add_tokens(["<tool>", AddedToken("héllo wörld", normalized=False)])
    backend.post_processor = bos_first()
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """SentencePiece-like BPE: spaces are ``▁``, unknown characters are byte tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    trained.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    state = json.loads(trained.to_str())["model"]
    learnt = sorted(state["vocab"], key=state["vocab"].__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in state["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = bos_first()
    return backend


def metaspace() -> tokenizers.Tokenizer:
    """The same with the Metaspace decoder, which drops the first token's mark."""
    backend = byte_fallback()
    backend.decoder = decoders.Metaspace()
    return backend


def wordpiece() -> tokenizers.Tokenizer:
    """A decoder that does not reduce to bytes per token."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace, "wordpiece": wordpiece}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> checkpoint folder."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write(root / name, make(), chat_template=CHAT) for name, make in KINDS.items()}


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo checkpoint."""
    if not DEMO.is_dir():
        pytest.skip("the demo checkpoint is not beside this package")
    return DEMO


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    """Kind -> tokenizer, and the demo model's where it is at hand."""
    found = {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}
    if DEMO.is_dir():
        found["demo"] = Tokenizer.from_folder(DEMO)
    return found


@pytest.fixture(scope="session")
def tokenizer(loaded: dict[str, Tokenizer]) -> Tokenizer:
    """The byte-level one."""
    return loaded["byte_level"]
