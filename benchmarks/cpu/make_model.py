"""Make the benchmark checkpoint: random weights, 125 M parameters (100 M of them read per token), with a BPE tokenizer.

python benchmarks/cpu/make_model.py FOLDER
"""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 32000
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]


def corpus() -> Iterator[str]:
    """Python's own library: on every machine, and large enough for 32,000 merges."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts:
            yield file.read_text(encoding="utf-8", errors="replace")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds a beginning-of-sequence token."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def main(folder: str) -> None:
    torch.manual_seed(1234)
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


main(sys.argv[1])
