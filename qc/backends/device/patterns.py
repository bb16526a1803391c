"""Compile the patterns that cut text into pieces for qc/runtime/device/patterns.c.

    alternatives  a|b     groups (?:a)   (?:a)?   (?i:a)      ahead (?=a)   (?!a)      end $
    characters    x   \\n   .   \\p{L}   [^\\s\\p{L}]      each with ? * + {n,m}, and possessive

which is what published tokenizers use. Which characters a class holds is asked of the tokenizers
library, so that both know the same Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

from qc.errors import UnsupportedError

MOST = 0xFFFFFFFF
MOST_FRAMES = 256  # of patterns.c: one instruction takes one frame at most

BLOCK = 0x800

Ranges = tuple[tuple[int, int], ...]
"""Characters from low to high, both included, rising."""


class Operation(IntEnum):
    """The instructions of patterns.c."""

    FOUND = 0
    REPEAT = 1
    HOLD = 2
    FORK = 3
    GO = 4
    AHEAD = 5
    NOT_AHEAD = 6
    TEXT_END = 7


@dataclass(frozen=True)
class Characters:
    """One character of a class, written as a pattern: [^\\r\\n], or \\p{L}."""

    text: str


@dataclass(frozen=True)
class End:
    """The end of the text."""


@dataclass(frozen=True)
class Group:
    """Alternatives, each a sequence; `ahead`: looked for without being taken (True, False for
    "must not be there")."""

    alternatives: tuple[tuple[Repeated, ...], ...]
    ahead: bool | None = None


@dataclass(frozen=True)
class Repeated:
    """An atom so many times."""

    atom: Characters | Group | End
    least: int = 1
    most: int = 1
    possessive: bool = False


class Parser:
    """Read one pattern. UnsupportedError quotes what is not understood."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.ignores_case = False

    def refuse(self, what: str) -> UnsupportedError:
        """Say where."""
        return UnsupportedError(
            f"the tokenizer's pattern {self.text!r} has {what} at {self.text[self.at :][:12]!r}, "
            "which the device's matcher lacks"
        )

    def take(self, token: str) -> bool:
        """Go past `token` if it comes next."""
        found = self.text.startswith(token, self.at)
        self.at += len(token) if found else 0
        return found

    def whole(self) -> Group:
        """Read everything."""
        group = self.group()
        if self.at < len(self.text):
            raise self.refuse("a ) too many")
        return group

    def group(self, ahead: bool | None = None) -> Group:
        """Read alternatives up to the end of the group."""
        alternatives: list[tuple[Repeated, ...]] = []
        sequence: list[Repeated] = []
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.take("|"):
                alternatives.append(tuple(sequence))
                sequence = []
            else:
                sequence.append(self.repeated())
        return Group((*alternatives, tuple(sequence)), ahead)

    def repeated(self) -> Repeated:
        """Read an atom and how often it comes."""
        atom = self.atom()
        counts = re.compile(r"\{(\d+)(,?)(\d*)\}").match(self.text, self.at)
        least, most = 1, 1
        if counts:
            self.at = counts.end()
            least = int(counts[1])
            most = int(counts[3]) if counts[3] else MOST if counts[2] else least
        else:
            for sign, span in (("?", (0, 1)), ("*", (0, MOST)), ("+", (1, MOST))):
                if self.take(sign):
                    least, most = span
                    break
            else:
                return Repeated(atom)
        if self.take("?"):
            raise self.refuse("a lazy repetition before it")
        return Repeated(atom, least, most, self.take("+"))

    def atom(self) -> Characters | Group | End:
        """Read a group or a class of characters."""
        if self.take("("):
            return self.parenthesis()
        if self.take("$") or self.take(r"\z"):
            return End()
        start = self.at
        if self.take("\\"):
            found = re.compile(r"[pP]\{\^?\w+\}|x\{\w+\}|x\w\w|u\w{4}|[^1-9AbBGZ]").match(
                self.text, self.at
            )
            if not found:
                raise self.refuse("an escape")
            self.at = found.end()
        elif self.text[self.at] == "[":
            self.at = self.end_of_class()
        elif self.text[self.at] in "^*+?{":
            raise self.refuse("an anchor or a repetition of nothing")
        else:
            self.at += 1
        text = self.text[start : self.at]
        return Characters(f"(?i:{text})" if self.ignores_case else text)

    def parenthesis(self) -> Group:
        """Read the rest of a group."""
        before = self.ignores_case
        ahead = None
        if self.take("?i:"):
            self.ignores_case = True
        elif self.take("?="):
            ahead = True
        elif self.take("?!"):
            ahead = False
        elif not self.take("?:") and self.take("?"):
            raise self.refuse("a kind of group")
        group = self.group(ahead)
        if not self.take(")"):
            raise self.refuse("no )")
        self.ignores_case = before
        return group

    def end_of_class(self) -> int:
        """Find the ] of a class, which may hold others."""
        depth, at = 0, self.at
        while at < len(self.text):
            character = self.text[at]
            at += 2 if character == "\\" else 1
            depth += {"[": 1, "]": -1}.get(character, 0)
            if depth == 0:
                return at
        raise self.refuse("no ]")


@dataclass
class Compiler:
    """Instructions and classes of all patterns of a tokenizer."""

    code: list[tuple[int, int, int, int]] = field(default_factory=list)
    classes: dict[Ranges, int] = field(default_factory=dict)

    def add(self, pattern: str) -> int:
        """Compile a pattern; return its first instruction."""
        start = len(self.code)
        self.emit_group(Parser(pattern).whole())
        self.emit(Operation.FOUND)
        if len(self.code) - start > MOST_FRAMES:
            raise UnsupportedError(f"the tokenizer's pattern {pattern[:60]!r}... is too long")
        return start

    def emit(self, operation: Operation, a: int = 0, b: int = 0, c: int = 0) -> int:
        """Add an instruction; return its number."""
        self.code.append((int(operation), a, b, c))
        return len(self.code) - 1

    def point(self, instruction: int) -> None:
        """Let a jump go to what comes next."""
        operation, _, b, c = self.code[instruction]
        self.code[instruction] = (operation, len(self.code), b, c)

    def emit_group(self, group: Group) -> None:
        """Try alternatives in order."""
        *others, last = group.alternatives
        leaving = []
        for sequence in others:
            fork = self.emit(Operation.FORK)
            self.emit_sequence(sequence)
            leaving.append(self.emit(Operation.GO))
            self.point(fork)
        self.emit_sequence(last)
        for jump in leaving:
            self.point(jump)

    def emit_sequence(self, sequence: Sequence[Repeated]) -> None:
        """One after the other."""
        for one in sequence:
            match one.atom:
                case Characters(text):
                    kind = Operation.HOLD if one.possessive else Operation.REPEAT
                    self.emit(kind, self.class_of(text), one.least, one.most)
                case End():
                    self.emit(Operation.TEXT_END)
                case Group(ahead=bool(ahead)) as group:
                    look = self.emit(Operation.AHEAD if ahead else Operation.NOT_AHEAD)
                    self.emit_group(group)
                    self.emit(Operation.FOUND)
                    self.point(look)
                case Group() as group:
                    self.emit_repeated_group(group, one)

    def emit_repeated_group(self, group: Group, one: Repeated) -> None:
        """A group once, or perhaps; one of single characters any number of times."""
        if (one.least, one.most) == (1, 1):
            self.emit_group(group)
            return
        if (one.least, one.most) == (0, 1) and not one.possessive:
            fork = self.emit(Operation.FORK)
            self.emit_group(group)
            self.point(fork)
            return
        single = [
            s[0].atom for s in group.alternatives if len(s) == 1 and s[0] == Repeated(s[0].atom)
        ]
        if len(single) < len(group.alternatives) or not all(
            isinstance(atom, Characters) for atom in single
        ):
            raise UnsupportedError("the tokenizer's pattern repeats a group of several characters")
        text = "|".join(atom.text for atom in single if isinstance(atom, Characters))
        kind = Operation.HOLD if one.possessive else Operation.REPEAT
        self.emit(kind, self.class_of(f"(?:{text})"), one.least, one.most)

    def class_of(self, text: str) -> int:
        """Return the number of a class."""
        return self.classes.setdefault(characters_of(text), len(self.classes))


@cache
def characters_of(text: str) -> Ranges:
    """Return all characters that a class matches, as the tokenizers library sees it."""
    if len(text) == 1 and text != ".":
        return ((ord(text), ord(text)),)
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    outside = Split(Regex(f"(?:{text})+"), "removed")
    ranges: list[tuple[int, int]] = []
    for first, block in blocks_of_characters():
        at = 0
        for start, end in [
            *(place for _, place in outside.pre_tokenize_str(block)),
            (len(block),) * 2,
        ]:
            if at < start:
                low, high = first + at, first + start - 1
                if ranges and ranges[-1][1] + 1 == low:
                    low = ranges.pop()[0]
                ranges.append((low, high))
            at = end
    return tuple(ranges)


@cache
def blocks_of_characters() -> tuple[tuple[int, str], ...]:
    """Return all characters of Unicode but the surrogates, which no text holds: the first of each
    block, and the block. The library takes time with the square of a text."""
    starts = [start for start in range(0, 0x110000, BLOCK) if not 0xD800 <= start < 0xE000]
    return tuple((start, "".join(map(chr, range(start, start + BLOCK)))) for start in starts)
