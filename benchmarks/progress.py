"""A progress bar on a terminal where tqdm is installed, and plain lines anywhere else."""

import os
import sys
import time
from types import TracebackType

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


SILENCE = 10  # seconds after which a line is printed though not another tenth is done


class Progress:
    """Shows how much of one stage is done; a context manager.

    Args:
        label: What the stage does.
        total: How many units it has.
    """

    def __init__(self, label: str, total: float) -> None:
        self.label, self.total, self.done, self.tenth = label, total, 0.0, 0
        self.bar: tqdm | None = None
        # Some terminals have no width, in containers for one: a bar would be invisible there.
        wide = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns
        if tqdm is not None and wide:
            form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=total, desc=label, bar_format=form, dynamic_ncols=True)

    def to(self, done: float, note: str = "") -> None:
        """Moves on to `done` units, with a few words on how things stand."""
        step, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(step)
        elif int(10 * done / self.total) > self.tenth or time.monotonic() > self.said + SILENCE:
            self.tenth = int(10 * done / self.total)
            self._say(f"{100 * done / self.total:3.0f} %  {note}")

    def _say(self, words: str) -> None:
        self.said = time.monotonic()
        print(f"{self.label}: {words}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        if self.bar is None:
            self._say("begins")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
