"""PTX text to instructions: one kernel, as Triton writes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Register:
    """A register by its name, which inline assembly's scopes make unique, and its width."""

    name: str
    bits: int


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a label, or `global_smem`."""

    name: str


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`, or `a|b`."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, or `[base, {coordinates}]` of a tensor map."""

    base: Register | Symbol
    offset: int = 0
    coordinates: tuple[Any, ...] = ()


@dataclass
class Instruction:
    """One statement.

    Attributes:
        line: Its line in the PTX.
        text: As it stands there.
        source: The lines of Python that it comes from, `"tiles.py:33 @[ forward.py:90 ]"`.
        guard: The predicate that must hold; `negated`: must not.
        parts: The opcode, split at its dots; `shared::cta` is `shared`.
        operands: As parsed.
        target: The index of the instruction that a branch goes to.
        run: The handler, found by `machine.Program`.
    """

    line: int
    text: str
    source: str
    guard: Register | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[Any, ...]
    target: int = -1
    run: Callable[..., int | None] | None = None

    @property
    def op(self) -> str:
        return ".".join(self.parts)


@dataclass
class Kernel:
    """A parsed entry: its parameters' names, threads a block, and instructions."""

    name: str
    parameters: list[str]
    threads: int
    code: list[Instruction] = field(default_factory=list)


_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")


def parse(ptx: str) -> Kernel:
    """The kernel of a module that has one."""
    return _Parser(ptx).kernel


class _Parser:
    def __init__(self, ptx: str) -> None:
        entry = re.search(r"\.entry\s+(\w+)\(([^)]*)\)([^{]*)\{", ptx)
        threads = entry and re.search(r"\.reqntid\s+(\d+)", entry[3])
        if entry is None or threads is None:
            raise ValueError("no .entry with .reqntid in this PTX")
        parameters = re.findall(r"\w+_param_\d+", entry[2])
        self.kernel = Kernel(entry[1], parameters, int(threads[1]))
        self.labels: dict[str, int] = {}
        # Inline assembly opens scopes of its own, whose labels and registers are local.
        self.scopes: list[tuple[int, dict[str, Register]]] = [(0, {})]
        self.prefixes: dict[str, int] = {}  # widths of `%r<100>` and the like
        self.opened = 0
        self._read(ptx[entry.end() :], ptx[: entry.end()].count("\n") + 1)
        for instruction in self.kernel.code:
            if instruction.parts[0] == "bra":
                instruction.target = self.labels[instruction.operands[0].name]

    def _read(self, body: str, first: int) -> None:
        source = ""
        for number, line in enumerate(body.split("\n"), first):
            line, _, comment = map(str.strip, line.partition("//"))
            if line.startswith(".section"):
                return
            if line.startswith(".loc"):  # Triton appends the place, and those that inlined it
                source = re.sub(r":\d+(?= |$)", "", comment) or line
                continue
            for text in _statements(line):
                if text == "{":
                    self.opened += 1
                    self.scopes.append((self.opened, {}))
                elif text == "}":
                    self.scopes.pop()
                    if not self.scopes:
                        return
                elif text.startswith("."):
                    self._declare(text)
                elif text.endswith(":"):
                    self.labels[self._scoped(text[:-1])] = len(self.kernel.code)
                else:
                    self.kernel.code.append(self._instruction(number, text, source))

    def _declare(self, text: str) -> None:
        if declared := _DECLARED.match(text):
            for name in declared[2].split(","):
                prefix, counted, _ = name.strip().partition("<")
                width = _WIDTHS[declared[1]]
                if counted:
                    self.prefixes[prefix] = width
                else:
                    self.scopes[-1][1][prefix] = Register(self._scoped(prefix), width)

    def _scoped(self, name: str) -> str:
        """The name, marked by its scope; names with `$` and `%` are the function's."""
        return name if name[0] in "$%" else f"{name}@{self.scopes[-1][0]}"

    def _instruction(self, number: int, text: str, source: str) -> Instruction:
        guard, negated, rest = None, False, text
        if match := re.match(r"@(!?)([%\w]+)\s+(.*)", text):
            guard, negated, rest = self._operand(match[2]), match[1] == "!", match[3]
        opcode, _, operands = re.sub(r"\s+", " ", rest).partition(" ")
        parts = tuple(re.sub("shared::(cta|cluster)", "shared", opcode).split("."))
        parsed = tuple(self._operand(item) for item in _split(operands.strip()))
        if parts[0] == "bra":
            parsed = (Symbol(self._scoped(parsed[0].name)),)
        return Instruction(number, text, source, guard, negated, parts, parsed)

    def _operand(self, text: str) -> Any:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(map(self._operand, _split(text.strip("{} ")))))
        if "|" in text:
            return Vector(tuple(map(self._operand, text.split("|"))))
        if text.startswith("["):
            base, *rest = _split(text[1:-1].strip())
            name, _, offset = base.partition("+")
            coordinates = self._operand(rest[0]).items if rest else ()
            return Address(self._operand(name), int(offset.strip() or "0", 0), coordinates)
        for _, declared in reversed(self.scopes):
            if text in declared:
                return declared[text]
        if text.startswith("%") or text == "_":
            return Register(text, self.prefixes.get(text.rstrip("0123456789"), 32))
        return Immediate(text) if re.match(r"-?\d", text) else Symbol(text)


def _statements(line: str) -> list[str]:
    """The statements of a line; labels, and a scope's braces, are statements of their own."""
    found = []
    for text in line.split(";"):
        text = text.strip()
        while text.startswith(("{", "}")):
            found.append(text[0])
            text = text[1:].strip()
        if label := re.match(r"([\w$]+:)(?!:)\s*(.*)", text):
            found.append(label[1])
            text = label[2]
        tail = []
        while text.endswith("}") and text.count("}") > text.count("{"):
            tail.append("}")
            text = text[:-1].strip()
        found += [text, *tail] if text else tail
    return found


def _split(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [*found, text[start:].strip()] if text else []
