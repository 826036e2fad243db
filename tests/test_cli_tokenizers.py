"""The tokens that are measured are the model's own: those of its tokenizer.json, or of a GGUF file's vocabulary."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gguf_models import Writer
from logitless.cli import pre_tokenizers as rules
from logitless.cli.errors import InputError
from logitless.cli.gguf_architectures import ARCHITECTURES
from logitless.cli.gguf_file import read_gguf
from logitless.cli.gguf_tokenizer import gguf_tokenizer
from logitless.cli.models import open_model, parse_model_name
from logitless.cli.networks import transformers
from logitless.cli.text import bos_rule
from logitless.cli.tokenizer import TextTokenizer, read_tokenizer_json
from models import byte_tokenizer, save_model

TEXTS = {
    "code": "def f(x):\n\treturn {'a': x**2, \"b\": [1, 22, 333]}  # don't\n\n\n    if x_1 != 0x1F:\r\n        pass\n",
    "csv": "id,  name,   value\n  1, alpha,  3.14159\n 22, beta,   1000000\n333, gamma,  -2.5e-10\n\n4444,,\n",
    "digits": "1 22 333 4444 55555 666666 1234567 3.14159 1,000,000 ²½ ٣٤ 2024-01-31T12:00:00Z",
    "cjk": "你好，世界！今天是2024年。日本語のテキスト、カタカナ。한국어 문장입니다.１２３",
    "emoji": "fire 🔥🔥 family 👨‍👩‍👧 flag 🇩🇪 heart ❤️ naïve Å e\u0301 ﬁ\u00a0x",
    "words": "I'm sure WE'LL see: HTMLParser's camelCase, snake_case & so on...   \n \n  Don't—really—don't! ",
    "spaces": "   leading\t\ttabs   and \n\n\n newlines  \n   trailing   ",
}


@pytest.fixture(scope="session")
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges that know of no words: learned over whole lines, so that where a rule cuts decides what can merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = [text[i : i + 9] for text in TEXTS.values() for i in range(0, len(text) - 4, 3)]
    tokenizer.train_from_iterator(lines * 3, trainer)
    described = json.loads(tokenizer.to_str())["model"]
    return described["vocab"], [tuple(merge) for merge in described["merges"]]


def byte_level(vocabulary: tuple[dict[str, int], list[tuple[str, str]]], **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary[0], merges=vocabulary[1], **options))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gguf_vocabulary(path: Path, **keys: Any) -> TextTokenizer:
    """Write a GGUF file that is nothing but a tokenizer, and read it."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "llama"))
    for name, value in keys.items():
        key = f"tokenizer.ggml.{name}"
        if name in ("tokens", "merges", "token_type", "scores"):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return gguf_tokenizer(read_gguf(path))


def from_merges(path: Path, vocabulary: tuple[dict[str, int], list[tuple[str, str]]], **keys: Any) -> TextTokenizer:
    tokens = sorted(vocabulary[0], key=vocabulary[0].__getitem__)
    merges = [" ".join(pair) for pair in vocabulary[1]]
    return gguf_vocabulary(path, **{"model": "gpt2", "tokens": tokens, "merges": merges, **keys})


# llama.cpp's own expressions (llama-vocab.cpp), one after another, each cutting what the one before left in one piece;
# `\s+` last where llama.cpp's hand-written GPT-2 splitter has it.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LLAMA_3 = _CASELESS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN_3_5 = _CASELESS + (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_CPP: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "exaone4"), (_GPT_2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), (r"\p{N}", _GPT_2)),
    **dict.fromkeys(("exaone", "minerva-7b", "command-r"), (r"\p{N}", _GPT_2)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), (_LLAMA_3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), (_LLAMA_3,)),
    **dict.fromkeys(("qwen2", "megrez", "deepseek-r1-qwen", "stablelm2"), (_QWEN_2,)),
    "qwen35": (_QWEN_3_5,),
    "seed-coder": (_SEED,),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _V3),
}
# llama.cpp approximates these two by look-ahead; transformers reads them from the models' tokenizer.json.
TRANSFORMERS = ("tekken", "gpt-4o", "llama4", "llama-bpe", "qwen2", "qwen35", "smaug-bpe", "deepseek-r1-qwen", "dbrx")


def cut(text: str, expressions: tuple[str, ...]) -> list[str]:
    pieces = [text]
    for expression in expressions:
        following = []
        for piece in pieces:
            place = 0
            for found in regex.finditer(expression, piece):
                following += [piece[place : found.start()], found[0]]
                place = found.end()
            following.append(piece[place:])
        pieces = [piece for piece in following if piece]
    return pieces


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_a_named_rule_cuts_as_llama_cpp_does(tmp_path: Path, vocabulary: Any, name: str) -> None:
    known = rules.pre_tokenizer(name)
    assert known is not None
    whole = byte_level(vocabulary, ignore_merges=known.ignore_merges)
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = from_merges(tmp_path / "v.gguf", vocabulary, pre=name, add_bos_token=False)
    for kind, text in TEXTS.items():
        if known.normalizer is not None:
            text = known.normalizer.normalize_str(text)
        expected = [token for piece in cut(text, LLAMA_CPP[name]) for token in whole.encode(piece).ids]
        assert tokenizer.encoded(text).ids == expected, kind
        assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_named_rule_cuts_as_transformers_does(tmp_path: Path, vocabulary: Any, name: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = rules.pre_tokenizer(name)
    assert known is not None
    reference = byte_level(vocabulary, ignore_merges=known.ignore_merges)
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = from_merges(tmp_path / "v.gguf", vocabulary, pre=name, add_bos_token=False)
    for kind, text in TEXTS.items():
        if known.normalizer is not None:
            text = known.normalizer.normalize_str(text)
        assert tokenizer.encoded(text).ids == reference.encode(text).ids, kind


def _regex(expression: str) -> Any:
    from tokenizers import Regex

    return Regex(expression)


CLASSES = {
    "gpt-2": transformers.GPT2Tokenizer,
    "qwen2": transformers.Qwen2Tokenizer,
    "command-r": transformers.CohereTokenizer,
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_named_rule_is_that_of_the_class(tmp_path: Path, vocabulary: Any, name: str) -> None:
    """Normalisation included: Qwen and Command R compose characters first."""
    reference = CLASSES[name](vocab=dict(vocabulary[0]), merges=list(vocabulary[1]))
    tokenizer = from_merges(tmp_path / "v.gguf", vocabulary, pre=name, add_bos_token=False)
    for kind, text in TEXTS.items():
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encoded(text).ids == expected, kind


def test_every_rule_is_held_to_another_source() -> None:
    # DeepSeek-LLM's letters are listed one by one there as here, so there is nothing else to hold them to.
    assert set(rules.NAMES) == {*LLAMA_CPP, *TRANSFORMERS, "deepseek-llm"}


def test_the_documentation_names_every_rule_and_architecture() -> None:
    page = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text("utf-8")
    words = set(regex.findall(r"[\w.]+(?:-[\w.]+)*", page.replace(". Another", " Another")))
    assert {*rules.NAMES, *ARCHITECTURES} <= words


def test_deepseek_llm_splits_lines_words_punctuation_and_digits(tmp_path: Path, vocabulary: Any) -> None:
    tokenizer = from_merges(tmp_path / "v.gguf", vocabulary, pre="deepseek-llm", add_bos_token=False)
    text = "Καλημέρα, the 123\n\n你好 x"
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == [
        *("Καλημέρα", ",", " the", " ", "1", "2", "3", "\n", "\n", "你好", " x")
    ]


def test_special_and_user_defined_tokens_are_found_in_a_text(tmp_path: Path, vocabulary: Any) -> None:
    tokens = [*sorted(vocabulary[0], key=vocabulary[0].__getitem__), "<|im_start|>", "<think>", "[PAD9]"]
    kinds = [1] * len(vocabulary[0]) + [3, 4, 5]
    tokenizer = from_merges(tmp_path / "v.gguf", vocabulary, pre="smollm", tokens=tokens, token_type=kinds)
    special = len(vocabulary[0])
    ids = tokenizer.encoded("a<|im_start|>b<think>[PAD9]").ids
    assert special in ids
    assert special + 1 in ids
    assert special + 2 not in ids
    assert tokenizer.special == {special: "<|im_start|>"}
    assert tokenizer.size == special + 2
    assert bos_rule(tokenizer).token is None


@functools.cache
def pieces(prefixed: bool) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece model as Llama's (which puts a space before a text) or as Gemma's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS.values() for line in text.splitlines()] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefixed,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        user_defined_symbols=["<mark>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def piece_keys(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Return a SentencePiece model as llama.cpp's converter writes it."""
    kinds = []
    for index in range(pieces.get_piece_size()):
        if pieces.is_unknown(index):
            kinds.append(2)
        elif pieces.is_control(index):
            kinds.append(3)
        elif pieces.id_to_piece(index) == "<mark>":
            kinds.append(4)
        else:
            kinds.append(6 if pieces.is_byte(index) else 1)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())],
        "scores": [pieces.get_score(index) for index in range(pieces.get_piece_size())],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_sentencepiece_vocabulary_is_cut_as_sentencepiece_cuts(tmp_path: Path, architecture: str) -> None:
    prefixed = architecture == "llama"
    processor = pieces(prefixed)
    tokenizer = gguf_vocabulary(
        tmp_path / "v.gguf", architecture=architecture, **piece_keys(processor), add_space_prefix=prefixed
    )
    for kind, text in TEXTS.items():
        ids = tokenizer.encoded(text).ids
        assert ids == processor.encode(text), kind
        assert tokenizer.decode(ids) == text
    # A text is cut at marks first. llama.cpp and tokenizers put a space before each part.
    mark = processor.piece_to_id("<mark>")
    assert tokenizer.encoded("a <mark>b").ids == [*processor.encode("a "), mark, *processor.encode("b")]
    assert bos_rule(tokenizer).token == 1


TOKENIZER_CLASSES = (
    *("GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"),
    *("Qwen2Tokenizer", "GemmaTokenizer", "GPTNeoXTokenizerFast", "CohereTokenizerFast", "TokenizersBackend", None),
)


@pytest.mark.parametrize("name", TOKENIZER_CLASSES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_directory_has_the_tokens_of_its_tokenizer_json(
    tmp_path: Path, vocabulary: Any, name: str | None, kind: str
) -> None:
    size = len(vocabulary[0])
    folder = save_model(tmp_path / "model", rows=size)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    reference = byte_level(vocabulary)
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({} if name is None else {"tokenizer_class": name}))
    tokenizer = open_model(parse_model_name(str(folder))).tokenizer
    for text in TEXTS.values():
        assert tokenizer.encoded(text).ids == reference.encode(text).ids


@pytest.mark.parametrize(
    ("config", "token"),
    [
        ({}, None),
        ({"add_bos_token": True, "bos_token": "<s>"}, 0),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, 0),
        ({"add_bos_token": False, "bos_token": "<s>"}, None),
    ],
)
def test_the_token_before_a_text_follows_the_tokenizers_files(
    tmp_path: Path, config: dict[str, Any], token: int | None
) -> None:
    for adds in (False, True):
        folder = tmp_path / str(adds)
        byte_tokenizer(bos=adds).save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        expected = 0 if adds and not config else token
        assert bos_rule(read_tokenizer_json(folder)).token == expected


def test_two_tokens_before_a_text_are_refused(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="puts 2 tokens before a text"):
        read_tokenizer_json(tmp_path)


def test_a_truncation_in_tokenizer_json_cuts_no_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8, pad_id=0)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(read_tokenizer_json(tmp_path).encoded("a longer text").ids) == 13


def test_the_packaged_models_rule_is_its_own() -> None:
    """SmolLM2 splits digits, which transformers does not know of its file's rule: `1000` would be two tokens."""
    from models import real_model_path

    tokenizer = gguf_tokenizer(read_gguf(real_model_path()))
    tokens = [tokenizer.token(token) or "" for token in tokenizer.encoded(" 1000,\n  22").ids]
    assert [token for token in tokens if regex.search(r"\d", token)] == list("100022")


def test_a_file_of_a_directory_has_its_tokens(tmp_path: Path, vocabulary: Any) -> None:
    folder = save_model(tmp_path / "model", rows=len(vocabulary[0]) + 7)
    reference = byte_level(vocabulary)
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.add_special_tokens(["<|end|>"])
    reference.save(str(folder / "tokenizer.json"))
    sources = [open_model(parse_model_name(str(folder)))]
    sources.append(open_model(parse_model_name(str(Writer(folder).write(tmp_path / "model.gguf")))))
    one, other = (source.tokenizer for source in sources)
    assert one.tokens == other.tokens
    assert sources[0].classes == sources[1].classes == len(vocabulary[0]) + 1
    for text in TEXTS.values():
        assert one.encoded(f"{text}<|end|>").ids == other.encoded(f"{text}<|end|>").ids
