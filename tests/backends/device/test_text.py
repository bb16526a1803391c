"""The device's tokenizer says what the tokenizers library says, on the kinds that models use."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qc.backends.device.patterns import characters_of
from qc.backends.device.text_tables import GPT2, text_tables
from qc.errors import UnsupportedError
from tests.backends.device.text_library import DeviceText, compile_text_library
from tests.needs import needs

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD = [
    "", " ", "  a  b\n\n\n c\t\td  ", "naïve 你好世界 🤦🏽‍♂️ ½ ²३ I'LL", "\u00a0\u3000x\u2028y",
    "a" * 3000, " " * 2000, "\r\n\r\n \n", "😀" * 50, "ﬁ ſ's 'ſ ǅ é e\u0301", "12345678 1,000.00",
    "x = {'a': [1, 2]}  # comment\n\treturn\n", "\x00\x01\x7f", "▁ ▁▁ a▁b", "<mark><mark > <end>",
    "a <strip> b  <strip>  c", "\u0000\U0010ffff\ud7ff\ue000", "\n <end>\n\nx", "...!?;:—–“”",
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_text_library(tmp_path_factory.mktemp("text"))


def trained(tokenizer: Tokenizer, text: str, **more: Any) -> Tokenizer:
    """Learn merges, and add tokens of every kind."""
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, **more)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken("<end>", special=True), "<mark>"])
    tokenizer.add_tokens(
        [AddedToken("<strip>", lstrip=True, rstrip=True, normalized=False), AddedToken("<mark >")]
    )
    return tokenizer


def byte_level(pattern: str | None, individual_digits: bool = False, space: bool = False) -> Any:
    """Make tokenizers that work on bytes, as GPT-2, Llama 3 and others do."""

    def make(text: str) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None))
        parts: list[Any] = []
        if individual_digits:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        if pattern is not None:
            parts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=pattern is None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trained(tokenizer, text, initial_alphabet=alphabet)
        end = tokenizer.token_to_id("<end>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<end> $A", special_tokens=[("<end>", end)]
        )
        return tokenizer

    return make


def sentence_piece(metaspace: str | None, strip: bool = True) -> Callable[[str], Tokenizer]:
    """Make tokenizers that work on characters, as Llama 2, Mistral and Gemma do."""

    def make(text: str) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        replace, fallback = decoders.Replace("▁", " "), decoders.ByteFallback()
        if metaspace is None:
            parts = [normalizers.Prepend("▁")] if strip else []
            tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
            rest = [decoders.Strip(" ", 1, 0)] if strip else []
            tokenizer.decoder = decoders.Sequence([replace, fallback, decoders.Fuse(), *rest])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
            tokenizer.decoder = decoders.Metaspace(prepend_scheme=metaspace)
        bytes_and_unknown = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        return trained(tokenizer, text, special_tokens=bytes_and_unknown)

    return make


KINDS: dict[str, Callable[[str], Tokenizer]] = {
    "gpt2": byte_level(None),
    "gpt2-with-space": byte_level(None, space=True),
    "smollm": byte_level(None, individual_digits=True),
    "llama3": byte_level(LLAMA3),
    "o200k": byte_level(O200K),
    "llama2": sentence_piece(None),
    "gemma": sentence_piece(None, strip=False),
    "mistral": sentence_piece("first"),
    "metaspace": sentence_piece("always"),
}


def qwen(text: str) -> Tokenizer:
    """Make a tokenizer that composes characters first, as Qwen's does."""
    tokenizer = byte_level(LLAMA3)(text)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


KINDS["qwen"] = qwen


def special_of_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens are special only to the trainer: else decoding would leave them out."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(content))


def sample(text: str, count: int, generator: random.Random) -> list[str]:
    """Cut pieces out of a text."""
    starts = [generator.randrange(len(text)) for _ in range(count)]
    return [text[start : start + generator.randrange(1, 1200)] for start in starts]


def compare(tokenizer: Tokenizer, device: DeviceText, texts: list[str]) -> None:
    """Check both directions for every text."""
    for text in texts:
        for special in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=special).ids
            assert device.encode(text, special) == ids, text
        assert device.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_texts_are_the_librarys(kind: str, library: Any, evaluation_text: Path) -> None:
    text = evaluation_text.read_text()
    tokenizer = special_of_bytes(KINDS[kind](text[:60_000]))
    device = DeviceText(library, text_tables(tokenizer.to_str().encode()))
    assert device.status == 0, device.message
    compare(tokenizer, device, [*ODD, *sample(text, 60, random.Random(0))])


def test_random_tokens_decode_alike(library: Any, evaluation_text: Path) -> None:
    """Bytes in every order: what is no UTF-8 becomes U+FFFD in the same places."""
    tokenizer = KINDS["gpt2"](evaluation_text.read_text()[:60_000])
    device = DeviceText(library, text_tables(tokenizer.to_str().encode()))
    generator = random.Random(1)
    for _ in range(500):
        ids = [generator.randrange(tokenizer.get_vocab_size()) for _ in range(40)]
        assert device.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stream_never_holds_half_a_character(library: Any, evaluation_text: Path) -> None:
    tokenizer = KINDS["llama3"](evaluation_text.read_text()[:60_000])
    device = DeviceText(library, text_tables(tokenizer.to_str().encode()))
    for text in ODD:
        pieces = device.stream(tokenizer.encode(text, add_special_tokens=False).ids)
        assert (
            b"".join(pieces).decode() == text.replace("<end>", "").replace("<mark>", "")
            or "<" in text
        )
        for piece in pieces:
            piece.decode()


@pytest.mark.slow
@needs("model")
def test_the_real_tokenizer_on_two_thousand_texts(
    library: Any, offgrid_model: Path, evaluation_text: Path, calibration_text: Path
) -> None:
    raw = (offgrid_model / "tokenizer.json").read_bytes()
    device = DeviceText(library, text_tables(raw), 49152)
    text = evaluation_text.read_text() + calibration_text.read_text()
    texts = [*ODD, *sample(text, 2000, random.Random(0))]
    compare(Tokenizer.from_buffer(raw), device, texts)


def test_classes_hold_what_the_library_matches() -> None:
    assert characters_of("[a-c]") == ((97, 99),)
    assert characters_of("x") == ((120, 120),)
    assert (0x2028, 0x2029) in characters_of(r"\s")
    outside = characters_of(r"\P{L}")
    assert all(not low <= ord("é") <= high for low, high in outside)
    assert outside[-1][1] == 0x10FFFF


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "the pre-tokenizer BertPreTokenizer"),
        (
            {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
            "the decoder WordPiece",
        ),
        ({"decoder": None}, "the decoder None"),
    ],
)
def test_what_the_tables_lack_is_refused(change: dict[str, Any], said: str) -> None:
    tokenizer = byte_level(None)("some text to learn from\n" * 20)
    content = {**json.loads(tokenizer.to_str()), **change}
    with pytest.raises(UnsupportedError, match=said):
        text_tables(json.dumps(content).encode())


@pytest.mark.parametrize("pattern", [r"(ab)+", r"a+?", r"(?<=a)b", r"^a", r"(?>a)", r"\1", r"[a"])
def test_patterns_beyond_the_matcher_are_refused(pattern: str) -> None:
    from qc.backends.device.patterns import Compiler

    with pytest.raises(UnsupportedError, match="pattern"):
        Compiler().add(pattern)


def test_composing_is_unicodes(library: Any, evaluation_text: Path) -> None:
    """Every character alone, apart, and beside marks and others that it may join."""
    tables = text_tables(qwen(evaluation_text.read_text()[:60_000]).to_str().encode())
    device = DeviceText(library, tables)
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and chr(c) != "\n"]
    apart = [unicodedata.normalize("NFD", c) for c in every]
    marks = [c for c in every if unicodedata.combining(c)]
    changing = [c for c, parts in zip(every, apart, strict=True) if c != parts]
    generator, pool = random.Random(5), [*marks, *changing[:3000], *"aeiouAEIOUnsy가각ᄀ힣ᅡᆨ"]
    mixed = ["".join(generator.choices(pool, k=generator.randrange(2, 9))) for _ in range(60_000)]
    beside = [c + mark + "\u0301" for c in changing for mark in "\u0327\u0323\u0308"]
    runs = ["a" + "".join(generator.choices(marks, k=200)) for _ in range(50)]
    text = "\n".join([*every, *apart, *beside, *mixed, *runs])
    assert device.compose(text) == unicodedata.normalize("NFC", text)


def test_bytes_of_no_character_are_not_composed(library: Any) -> None:
    device = DeviceText(library, text_tables(qwen("some text " * 50).to_str().encode()))
    assert device.compose_bytes(b"e\xcc\x81\xcc\xffe\xcc") == b"\xc3\xa9\xcc\xffe\xcc"


def test_damaged_tables_are_refused(library: Any) -> None:
    """Not by checksum, which weights.c compares: what the tables say must fit together."""
    tables = text_tables(byte_level(GPT2)("some text to learn from\n" * 20).to_str().encode())
    assert DeviceText(library, tables).status == 0
    assert DeviceText(library, tables, vocabulary=10).status == 4
    for size in (0, 10, 100, len(tables) // 2, len(tables) - 4):
        device = DeviceText(library, tables[:size])
        assert device.status in (4, 5)
        assert device.message
