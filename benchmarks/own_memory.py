"""Measures a process's private memory: RssAnon, which does not include mapped files."""

import threading
from pathlib import Path


class OwnMemory:
    """A context that measures private memory in GB: `before_gb` at its begin, `most_gb` the peak until its end."""

    def __enter__(self) -> "OwnMemory":
        self.before_gb = self.most_gb = _anonymous_gb()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            self.most_gb = max(self.most_gb, _anonymous_gb())


def _anonymous_gb() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024 / 1e9
