"""Tokenizers of the families that models use, made in memory: byte-level BPE, SentencePiece-like BPE, WordPiece."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen's and Hermes' have it, in short.
TOOL_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "größer, höher, weiter",
    "stop here and stop there",
    "日本語の文章です",
]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen, SmolLM: any text; ids 0-2 are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2, Mistral, Gemma: ``▁`` for a space, byte tokens for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁h", "▁w", "lo", "or"]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [("▁", "h"), ("▁", "w"), ("l", "o"), ("o", "r")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT-like vocabularies: words and ``##`` continuations."""
    words = ["[UNK]", "hel", "##lo", "wor", "##ld", ",", "!", "don", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def save(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A model folder with the byte-level tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))
    return folder


def save_dummy_model(folder: Path) -> str:
    """A model of random weights with this tokenizer, as ``model`` of a configuration names it."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    ).save_pretrained(save(folder))
    return f"dummy:{folder}"
