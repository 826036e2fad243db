"""How byte-level vocabularies cut a text before they merge bytes: a rule for each `tokenizer.ggml.pre` that is known.

A GGUF file names the rule and does not hold it. The rules here are those of the models' own tokenizer.json; the names
are llama.cpp's. Source: the table of rules in llama.cpp's llama-vocab.cpp, which quotes the original expressions.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN_2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_QWEN_3_5 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|" + _REST_WITH_SLASH
)
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}|" + _REST_WITH_SLASH
)
_SEED_CODER = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK_DEEPSEEK = "[一-龥ࠀ-一가-퟿]+"
# Cased letters as DeepSeek lists them; escaped are those that Unicode's composition would change in this file.
_DEEPSEEK_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳ"
    "Ꙁ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM_WORD = rf"\s?[{_DEEPSEEK_CASED}]+"
_DEEPSEEK_LLM = (r"[\r\n]", _DEEPSEEK_LLM_WORD, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK_DEEPSEEK)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_DEEPSEEK)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """A rule: what cuts the text, what normalises it first, and whether a whole piece that is a token stays whole."""

    cut: Any
    normalizer: Any = None
    ignore_merges: bool = False
    adds_bos: bool = False


def _split(*expressions: str, digits: bool = False) -> Any:
    steps: list[Any] = [Split(Regex(expression), "isolated") for expression in expressions]
    if digits:
        steps.append(Digits(individual_digits=True))
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt_2() -> PreTokenizer:
    return PreTokenizer(ByteLevel(add_prefix_space=False))


def _single_digits(normalizer: Any = None) -> PreTokenizer:
    return PreTokenizer(Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), normalizer)


def _llama_3() -> PreTokenizer:
    return PreTokenizer(_split(_LLAMA_3), ignore_merges=True, adds_bos=True)


_RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "exaone4"), _gpt_2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _single_digits),
    "command-r": lambda: _single_digits(NFC()),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _llama_3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), lambda: PreTokenizer(_split(_LLAMA_3))),
    **dict.fromkeys(("qwen2", "megrez"), lambda: PreTokenizer(_split(_QWEN_2), NFC())),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2"), lambda: PreTokenizer(_split(_QWEN_2))),
    "qwen35": lambda: PreTokenizer(_split(_QWEN_3_5), NFC()),
    "tekken": lambda: PreTokenizer(_split(_TEKKEN), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), lambda: PreTokenizer(_split(_GPT_4O))),
    "seed-coder": lambda: PreTokenizer(_split(_SEED_CODER)),
    "deepseek-llm": lambda: PreTokenizer(_split(*_DEEPSEEK_LLM, digits=True)),
    "deepseek-coder": lambda: PreTokenizer(_split(*_DEEPSEEK_CODER, digits=True)),
    "deepseek-v3": lambda: PreTokenizer(_split(*_DEEPSEEK_V3)),
}

NAMES = tuple(sorted(_RULES))


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """Return the rule of a name, or None for a name that is not known."""
    rule = _RULES.get(name)
    return None if rule is None else rule()
