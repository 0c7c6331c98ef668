"""A text task without a download: which family of modules does this documentation come from?

The texts are the first paragraphs of documentation strings, read from the sources of the standard
library and of packages that are installed with PyTorch, transformers and matplotlib. They depend on
the versions of these alone.

So that an answer must come from what a text says, module and symbol names are masked, and no two
texts of the task, whatever part they are in, have `NEAR` of their words in common.
"""

import ast
import functools
import hashlib
import importlib.util
import itertools
import math
import platform
import re
import sysconfig
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

# The first six are the standard library's; modules that a Python does not have are passed over.
FAMILIES = {
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading",
    "files": "bz2 configparser dbm fileinput gzip lzma ntpath os pathlib plistlib posixpath shelve "
    "shutil sqlite3 stat tarfile tempfile zipfile",
    "language": "ast codeop dis importlib inspect pickle pkgutil pydoc tokenize traceback types",
    "network": "ftplib http imaplib ipaddress poplib smtplib socket socketserver ssl urllib "
    "webbrowser wsgiref xmlrpc",
    "text": "argparse csv difflib email gettext html json mailbox string textwrap xml",
    "trials": "bdb cProfile doctest logging pdb profile pstats timeit trace unittest",
    "arrays": "numpy",
    "distributed": "torch.distributed",
    "graphs": "networkx",
    "layers": "torch.distributions torch.nn torch.optim",
    "plots": "matplotlib",
    "polynomials": "sympy.polys",
}
PACKAGES = ("matplotlib", "networkx", "numpy", "sympy", "torch")  # beside the standard library
PARTS = {"train": 200, "validation": 50, "test": 90}  # texts of each family, at most
READ = 700  # texts of each family that are read before those too much alike are taken out
NEAR = 0.6  # the share of common words, among all words of both, at which two texts are too alike
WORDS = (5, 40)  # distinct words at least, words at most
MASK = "_"

SKIPPED = {"test", "tests", "testing", "_vendor", "idlelib", "lib2to3"}
CODE = re.compile(
    r"""
    \w+://\S+                      # addresses
    | :[\w:]+:`[^`]*`              # roles
    | `+[^`]*`+                    # quoted code
    | [\w.]+\([^)]*\)              # calls
    | \S*\w[._/\\:=]\w\S*          # dotted names, snake_case, paths, key=value
    | \b[_@]\w+ | \b\w+_\b         # private and trailing underscores
    | \b\w*[a-z]\w*[A-Z]\w*        # camelCase
    | \b[A-Z]+[A-Z][a-z]+\w*       # HTTPServer
    | \b\w*\d\w*                   # names and numbers with digits
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Documented:
    """One documentation string.

    Attributes:
        family: The family of its module.
        place: Module and symbol, dotted.
        text: The masked first paragraph.
        words: The text's words, for comparisons.
    """

    family: str
    place: str
    text: str
    words: frozenset[str] = field(repr=False)

    @property
    def order(self) -> int:
        """A number that shuffles and deals the texts, the same on every machine."""
        return zlib.crc32(" ".join(sorted(self.words)).encode())


def load() -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Reads, masks and deals the texts.

    Returns:
        By part, rows of `text` and `label` (a family's name); and a summary for the record: how
        many were read and how many kept, a digest of the rows, and the versions they depend on.
    """
    read = [
        one
        for family, modules in FAMILIES.items()
        for one in itertools.islice(documented(family, modules.split()), READ)
    ]
    kept = distinct(sorted(read, key=lambda one: (one.order, one.place)))
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    room = {(part, family): most for part, most in PARTS.items() for family in FAMILIES}
    for one in kept:
        part = deal(one)
        if room[part, one.family]:
            room[part, one.family] -= 1
            rows[part].append({"text": one.text, "label": one.family})
    return rows, {
        "read": dict(Counter(one.family for one in read)),
        "kept": dict(Counter(one.family for one in kept)),
        "digest": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def deal(one: Documented) -> str:
    """The part that a text belongs to, told by its words alone."""
    shares = [part for part, most in PARTS.items() for _ in range(most)]
    return shares[one.order // 7 % len(shares)]


def documented(family: str, modules: Sequence[str]) -> Iterator[Documented]:
    """The documentation strings of some modules, masked, file by file in a fixed shuffle.

    Too short and too long ones are left out.
    """
    files = [file for module in modules for file in sources(module)]
    for dotted, path in sorted(files, key=lambda file: zlib.crc32(file[0].encode())):
        with warnings.catch_warnings():  # of odd escapes in other people's strings
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for place, paragraph in paragraphs(tree, dotted):
            text = masked(paragraph, place)
            words = frozenset(words_of(text))
            if len(words) >= WORDS[0] and len(text.split()) <= WORDS[1]:
                yield Documented(family, place, text, words)


def sources(module: str) -> list[tuple[str, Path]]:
    """Dotted names and files of a module and of what lies beneath it, without importing it.

    None for a module that this Python does not have.
    """
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return []
    if spec.origin == "frozen":  # os and the like, which start with Python itself
        root = Path(sysconfig.get_paths()["stdlib"], top)
    else:
        origin = Path(spec.origin)
        root = origin.parent if origin.name == "__init__.py" else origin.with_suffix("")
    root = root.joinpath(*rest)
    found = []
    for path in root.rglob("*.py") if root.is_dir() else [root.with_suffix(".py")]:
        inside = path.with_suffix("").relative_to(root).parts
        if path.exists() and SKIPPED.isdisjoint(inside):
            found.append((".".join([module, *inside]).removesuffix(".__init__"), path))
    return found


def paragraphs(node: ast.AST, place: str) -> Iterator[tuple[str, str]]:
    """Dotted place and first paragraph of every documentation string in a tree."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield place, text.split("\n\n")[0]
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        yield from paragraphs(child, f"{place}.{name}" if isinstance(name, str) else place)


def masked(text: str, place: str) -> str:
    """`text` on one line, with `MASK` for whatever looks like code or is a name.

    Names are those of the families' modules, for every text alike, and the parts of the text's own
    `place`, in any case, in the plural too, and also where `place` joins them (`send_message`).
    """
    text = CODE.sub(MASK, " ".join(text.split()))
    text = re.sub(r"[A-Za-z]+", lambda word: MASK if is_name(word[0], place) else word[0], text)
    return re.sub(rf"{MASK}([^\w\s]*{MASK})+", MASK, text)


def is_name(word: str, place: str) -> bool:
    """True for a word that is a family's module or a part of `place`."""
    return any(form in MODULES or form in names_of(place) for form in forms(word))


@functools.lru_cache
def names_of(place: str) -> frozenset[str]:
    """The parts of a dotted name, whole."""
    parts = (part.strip("_").lower() for part in place.split("."))
    return frozenset(part for part in parts if len(part) > 1)


def forms(word: str) -> set[str]:
    """A word as it stands and without a plural's ending."""
    word = word.lower()
    return {word, word.removesuffix("s"), word.removesuffix("es")}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def distinct(texts: Sequence[Documented]) -> list[Documented]:
    """The texts without those that are nearly another's, of which the first is kept.

    Texts with a share of at least `NEAR` in common have one of their rarest words in common: so
    many as could be missing, and one more. Only these need to be compared.
    """
    frequency = Counter(word for one in texts for word in one.words)
    kept: list[Documented] = []
    seen: dict[str, list[Documented]] = defaultdict(list)
    for one in texts:
        rarest = sorted(one.words, key=lambda word: (frequency[word], word))
        rarest = rarest[: len(rarest) - math.ceil(NEAR * len(rarest)) + 1]
        if not any(common(one, other) >= NEAR for word in rarest for other in seen[word]):
            kept.append(one)
            for word in rarest:
                seen[word].append(one)
    return kept


def common(one: Documented, other: Documented) -> float:
    """The share of common words among all words of both."""
    return len(one.words & other.words) / len(one.words | other.words)


MODULES = frozenset().union(*map(names_of, " ".join(FAMILIES.values()).split()))
