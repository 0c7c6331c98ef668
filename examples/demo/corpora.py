"""Two texts that every Python installation carries: its sources, and its documentation in English.

Nothing is downloaded. The bytes depend on the Python version alone, so each text has a digest
that goes into the record.
"""

import hashlib
import sysconfig
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
ENGLISH_RUN = 4096  # bytes that stay together when the English text is dealt to its splits


@dataclass(frozen=True)
class Split:
    """One text as uint8 tensors: `train` to learn, `validation` to choose, `held_out` to report."""

    train: Tensor
    validation: Tensor
    held_out: Tensor
    digest: str

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in ("train", "validation", "held_out")}


def python_sources(limit: int | None = None) -> Split:
    """The standard library's own modules, whole files dealt to the splits by their names' CRC.

    The folder of the English text, `pydoc_data`, is left out: it must be new to the model.

    Args:
        limit: About how many bytes to read at most; everything by default.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(p.relative_to(root).parts)]
    names = {path.relative_to(root).as_posix(): path for path in paths}
    texts, size = [], 0
    for name in sorted(names, key=lambda name: zlib.crc32(name.encode())):  # a fixed shuffle
        texts.append((zlib.crc32(name.encode()) // 64 % 20, names[name].read_bytes()))
        size += len(texts[-1][1])
        if limit is not None and size >= limit:
            break
    return _deal(texts)


def english() -> Split:
    """The documentation texts of `pydoc_data.topics`, each paragraph once, in runs of 4 KiB.

    Topics overlap (the one on special names contains five others whole), so splitting by topic
    would put training text into the held-out part; hence no paragraph is taken twice.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.strip("\n") + "\n\n")
    paragraphs.pop("", None)
    text = "".join(paragraphs.values()).encode()
    runs = (text[i : i + ENGLISH_RUN] for i in range(0, len(text), ENGLISH_RUN))
    return _deal((7 * i % 20, run) for i, run in enumerate(runs))


def _deal(texts: Iterable[tuple[int, bytes]]) -> Split:
    """Deals (number from 0 to 19, text) pairs: 0 and 1 held out, 2 and 3 validation."""
    parts: tuple[list[bytes], ...] = ([], [], [])
    for number, text in texts:
        parts[2 if number < 2 else 1 if number < 4 else 0].append(text)
    joined = [b"".join(part) for part in parts]
    digest = hashlib.sha256(b"\0".join(joined)).hexdigest()
    train, validation, held_out = (
        torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in joined
    )
    return Split(train, validation, held_out, digest)
