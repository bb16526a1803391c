"""Write a tokenizer as tables for a device: what qc/runtime/device/text.c walks.

Byte-pair encoding on bytes (GPT-2, Llama 3, Qwen) or on characters (SentencePiece: Llama 2,
Mistral, Gemma). What the tables cannot say is refused: a device must not differ silently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qc.backends.device.compositions import composition_tables
from qc.backends.device.patterns import Compiler
from qc.errors import UnsupportedError

FORMAT = 2
BYTE_LEVEL, WHOLE_PIECES, FUSE_UNKNOWN, DROP_SPACE, DROP_SPACES = 1, 2, 4, 8, 16
SILENT, BYTE = 1, 2
STRIP_LEFT, STRIP_RIGHT, NORMALIZED = 1, 2, 4
PREPEND, REPLACE, PREPEND_UNLESS, PREPEND_FIRST, COMPOSE = 0, 1, 2, 3, 4
LATER = 256  # added to an edit that comes after added tokens are cut out
SPLITS = {"isolated": 0, "removed": 1, "kept": 2, "mergedwithprevious": 3, "mergedwithnext": 4}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of ByteLevel in the tokenizers library."""


@dataclass(frozen=True)
class Edit:
    """A change of the text: `first` in front of it, or `second` for every `first`, or NFC."""

    kind: int
    first: str
    second: str = ""


@dataclass
class TextTables:
    """The tables of one tokenizer: the content of its tokenizer.json, and the library's view."""

    content: Mapping[str, Any]
    whole: Tokenizer
    edits: list[Edit] = field(default_factory=list)
    splits: list[tuple[int, int]] = field(default_factory=list)
    patterns: Compiler = field(default_factory=Compiler)
    flags: int = 0
    has_byte_pieces: bool = False

    def __post_init__(self) -> None:
        self.model = self.content["model"]
        if self.model.get("type") != "BPE":
            raise refusal(f"a model of type {self.model.get('type')}, not BPE")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(name):
                raise refusal(f"a {name}")
        self.vocabulary: dict[str, int] = self.model["vocab"]
        self.added = self.content.get("added_tokens") or []
        ids = [*self.vocabulary.values(), *(token["id"] for token in self.added)]
        self.size = max(ids) + 1
        self.read_normalizer(self.content.get("normalizer"))
        self.read_splits(self.content.get("pre_tokenizer"))
        self.read_decoder(self.content.get("decoder"))
        self.flags |= WHOLE_PIECES * bool(self.model.get("ignore_merges"))
        self.flags |= FUSE_UNKNOWN * bool(self.model.get("fuse_unk"))

    # ---- What is read

    def read_normalizer(self, part: Mapping[str, Any] | None) -> None:
        """Add the edits of a normalizer."""
        match part:
            case None:
                return
            case {"type": "Sequence", "normalizers": parts}:
                for each in parts:
                    self.read_normalizer(each)
            case {"type": "Prepend", "prepend": str(text)}:
                self.edits.append(Edit(PREPEND, text))
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self.edits.append(Edit(REPLACE, old, new))
            case {"type": "NFC"}:
                self.edits.append(Edit(COMPOSE, ""))
            case _:
                raise refusal(f"the normalizer {part.get('type')}")

    def read_splits(self, part: Mapping[str, Any] | None) -> None:
        """Add what cuts text into pieces."""
        match part:
            case None:
                return
            case {"type": "Sequence", "pretokenizers": parts}:
                for each in parts:
                    self.read_splits(each)
            case {"type": "ByteLevel"}:
                self.flags |= BYTE_LEVEL
                if part.get("add_prefix_space", True):
                    self.edit_later(Edit(PREPEND_UNLESS + LATER, " "))
                if part.get("use_regex", True):
                    self.split(GPT2, "isolated")
            case {"type": "Digits", "individual_digits": individual}:
                self.split(r"\p{N}" if individual else r"\p{N}+", "isolated")
            case {"type": "Split", "pattern": pattern, "behavior": str(behavior)}:
                text = pattern.get("Regex") or escaped(pattern.get("String", ""))
                inverted = part.get("invert", False)
                if inverted and behavior.lower() not in ("isolated", "removed"):
                    raise refusal(f"an inverted split that is {behavior}")
                kept = inverted and behavior.lower() == "removed"
                self.split(text, "kept" if kept else behavior.lower())
            case {"type": "Metaspace", "replacement": str(mark)}:
                self.read_metaspace(mark, part)
            case _:
                raise refusal(f"the pre-tokenizer {part.get('type')}")

    def read_metaspace(self, mark: str, part: Mapping[str, Any]) -> None:
        """Mark the spaces, and cut in front of the marks."""
        self.edit_later(Edit(REPLACE + LATER, " ", mark))
        scheme = part.get("prepend_scheme", "always")
        if scheme != "never":
            kind = PREPEND_UNLESS if scheme == "always" else PREPEND_FIRST
            self.edit_later(Edit(kind + LATER, mark))
        if part.get("split", True):
            self.split(escaped(mark), "mergedwithnext")

    def edit_later(self, edit: Edit) -> None:
        """Add an edit that belongs to the pre-tokenizer."""
        if self.splits:
            raise refusal("a pre-tokenizer that changes pieces")
        self.edits.append(edit)

    def split(self, pattern: str, behavior: str) -> None:
        """Add a cut."""
        if behavior not in SPLITS:
            raise refusal(f"splits that are {behavior}")
        self.splits.append((self.patterns.add(pattern), SPLITS[behavior]))

    def read_decoder(self, part: Mapping[str, Any] | None) -> None:
        """Find how tokens become text: `self.text_of` is what one token says."""
        self.text_of: Callable[[str], bytes] = str.encode
        match part:
            case {"type": "ByteLevel"} if self.flags & BYTE_LEVEL:
                self.text_of = bytes_of
            case {"type": "Sequence", "decoders": parts} if not self.flags & BYTE_LEVEL:
                self.read_decoders(parts)
            case {"type": "Metaspace"} if part is not None and not self.flags & BYTE_LEVEL:
                self.read_decoders([part])
            case _:
                raise refusal(f"the decoder {part and part.get('type')}")

    def read_decoders(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Find what a sequence of decoders replaces, and whether it drops a space."""
        replaced: list[tuple[str, str]] = []
        for part in parts:
            match part:
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replaced.append((old, new))
                case {"type": "ByteFallback"}:
                    self.has_byte_pieces = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Metaspace", "replacement": str(mark)}:
                    replaced.append((mark, " "))
                    self.flags |= DROP_SPACES * (part.get("prepend_scheme", "always") != "never")
                case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                    self.flags |= DROP_SPACE
                case _:
                    raise refusal(f"the decoder {part.get('type')}")

        def decode(token: str) -> bytes:
            for old, new in replaced:
                token = token.replace(old, new)
            return token.encode()

        self.text_of = decode

    # ---- What is written

    def byte_tokens(self) -> list[int]:
        """Return the tokens of the 256 bytes of unknown characters, if there are any."""
        if not self.model.get("byte_fallback"):
            return []
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        missing = [name for name in names if name not in self.vocabulary]
        if missing:
            raise refusal(f"no token {missing[0]}")
        return [self.vocabulary[name] for name in names]

    def pieces(self) -> tuple[list[bytes], np.ndarray[Any, Any]]:
        """Return what each token says, and its flags."""
        pieces, flags = [b""] * self.size, np.zeros(self.size, np.uint8)
        for token, number in self.vocabulary.items():
            pieces[number] = self.text_of(token)
        for byte, number in enumerate(self.byte_tokens() if self.has_byte_pieces else ()):
            pieces[number] = bytes([byte])
            flags[number] |= BYTE
        for token in self.added:
            pieces[token["id"]] = self.text_of(self.whole.id_to_token(token["id"]) or "")
            flags[token["id"]] = SILENT * bool(token.get("special"))
        return pieces, flags

    def merges(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return where each left token's merges start, and {right, rank, result} by left, right."""
        ranks: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, pair in enumerate(self.model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            result = self.vocabulary[left + right]
            ranks[self.vocabulary[left], self.vocabulary[right]] = (rank, result)
        rows = np.array(
            sorted((*pair, *merged) for pair, merged in ranks.items()), np.uint32
        ).reshape(-1, 4)
        ends = np.searchsorted(rows[:, 0], np.arange(self.size + 1)).astype(np.uint32)
        return ends, rows[:, 1:]

    def starts(self) -> list[tuple[int, int]]:
        """Return the tokens of single bytes or characters."""
        single = {token: number for token, number in self.vocabulary.items() if len(token) == 1}
        if self.flags & BYTE_LEVEL:
            return [(b, single[c]) for b, c in enumerate(BYTE_CHARACTERS) if c in single]
        return sorted((ord(token), number) for token, number in single.items())

    def sorted_tokens(self, pieces: Sequence[bytes]) -> list[int]:
        """Return the tokens of the model by what they say, for pieces that are tokens whole."""
        if not self.flags & WHOLE_PIECES:
            return []
        if not self.flags & BYTE_LEVEL:
            raise refusal("ignore_merges without bytes")
        added = {token["id"] for token in self.added}
        return sorted(
            (n for n in self.vocabulary.values() if n not in added), key=pieces.__getitem__
        )

    def added_rows(self) -> tuple[list[tuple[int, ...]], bytes, list[int]]:
        """Return added tokens by first byte, longest first; their bytes; where each byte starts."""
        rows: list[tuple[int, ...]] = []
        blob, first = b"", [0] * 257
        contents = [(self.matched_content(token), token) for token in self.added]
        for content, token in sorted(contents, key=lambda c: (c[0][0], -len(c[0]), c[0])):
            if token.get("single_word"):
                raise refusal(f"the added token {token['content']!r} that is a word of its own")
            flags = STRIP_LEFT * bool(token.get("lstrip")) | STRIP_RIGHT * bool(token.get("rstrip"))
            flags |= NORMALIZED * bool(token.get("normalized"))
            rows.append((len(blob), len(content), token["id"], flags))
            blob += content
            for byte in range(content[0] + 1, 257):
                first[byte] += 1
        return rows, blob, first

    def matched_content(self, token: Mapping[str, Any]) -> bytes:
        """Return what an added token is found by: normalized, if it is looked for in such text."""
        content: str = token["content"]
        if token.get("normalized") and self.whole.normalizer is not None:
            content = self.whole.normalizer.normalize_str(content)
        return content.encode()

    def edit_rows(self) -> tuple[list[tuple[int, ...]], bytes]:
        """Return the edits and their bytes."""
        rows: list[tuple[int, ...]] = []
        blob = b""
        for edit in self.edits:
            first, second = edit.first.encode(), edit.second.encode()
            at = len(blob)
            rows.append((edit.kind, at, len(first), at + len(first), len(second)))
            blob += first + second
        return rows, blob

    def class_rows(self) -> tuple[list[tuple[int, ...]], list[tuple[int, int]]]:
        """Return classes of characters, {first range, ranges, ASCII as bits}, and the ranges."""
        rows: list[tuple[int, ...]] = []
        ranges: list[tuple[int, int]] = []
        for characters in self.patterns.classes:
            bits = sum(1 << c for low, high in characters for c in range(low, min(high, 127) + 1))
            words = [bits >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)]
            rows.append((len(ranges), len(characters), *words))
            ranges += characters
        return rows, ranges

    def to_bytes(self, before: Sequence[int], after: Sequence[int]) -> bytes:
        """Write the tables; `before` and `after` are what special tokens stand around a text."""
        pieces, flags = self.pieces()
        merge_ends, merges = self.merges()
        added, added_bytes, added_first = self.added_rows()
        edits, edit_bytes = self.edit_rows()
        classes, ranges = self.class_rows()
        composes = any(edit.kind == COMPOSE for edit in self.edits)
        compositions = composition_tables() if composes else ([], [], [])
        sections = [
            unsigned([0, *np.cumsum([len(piece) for piece in pieces])]),
            (b"".join(pieces), 1),
            (flags.tobytes(), 1),
            unsigned(merge_ends),
            unsigned(merges, 3),
            unsigned(self.starts(), 2),
            unsigned(self.byte_tokens()),
            unsigned(added, 4),
            (added_bytes, 1),
            unsigned(added_first),
            unsigned(edits, 5),
            (edit_bytes, 1),
            unsigned(self.splits, 2),
            unsigned(self.patterns.code, 4),
            unsigned(classes, 6),
            unsigned(ranges, 2),
            unsigned(self.sorted_tokens(pieces)),
            unsigned(before),
            unsigned(after),
            *(unsigned(rows, width) for rows, width in zip(compositions, (6, 3, 3), strict=True)),
        ]
        unknown = self.vocabulary.get(self.model.get("unk_token") or "", -1)
        head = np.array([FORMAT, self.size, self.flags], "<u4").tobytes()
        head += np.array([unknown], "<i4").tobytes()
        return b"".join(laid_out(head, sections))


def laid_out(head: bytes, sections: Sequence[tuple[bytes, int]]) -> Iterator[bytes]:
    """Yield the header with the place of each section, then the sections."""
    at = len(head) + 8 * len(sections)
    places = []
    for content, size in sections:
        places.append((at, len(content) // size))
        at += -(-len(content) // 4) * 4
    yield head + np.array(places, "<u4").tobytes()
    for content, _ in sections:
        yield content + bytes(-len(content) % 4)


def unsigned(rows: Any, width: int = 1) -> tuple[bytes, int]:
    """Return rows of `width` 32-bit numbers as bytes, and the bytes of a row."""
    return np.asarray(rows, "<u4").tobytes(), 4 * width


def byte_characters() -> list[str]:
    """Return the character that stands for each byte: itself where it can be seen (GPT-2)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b) if b in visible else chr(256 + hidden.index(b)) for b in range(256)]


BYTE_CHARACTERS = byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def bytes_of(token: str) -> bytes:
    """Return the bytes of a token; one with other characters stands for itself."""
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


def escaped(text: str) -> str:
    """Write characters as a pattern that matches them."""
    return "".join(f"\\x{{{ord(c):x}}}" for c in text)


def refusal(what: str) -> UnsupportedError:
    """Say what of a tokenizer a device package cannot hold."""
    return UnsupportedError(
        f"the tokenizer has {what}, which device packages cannot hold: build from a "
        "folder without tokenizer files, and give token ids"
    )


def text_tables(tokenizer: bytes) -> bytes:
    """Return the tables of a tokenizer.json. UnsupportedError says what it needs that they lack."""
    whole = Tokenizer.from_buffer(tokenizer)
    tables = TextTables(json.loads(tokenizer), whole)
    plain = whole.encode("a", add_special_tokens=False).ids
    marked = whole.encode("a", add_special_tokens=True).ids
    at = next(i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
    return tables.to_bytes(marked[:at], marked[at + len(plain) :])
