"""Exposes a run's newest numbers to Prometheus: over HTTP (`--metrics-port`) and in a file (`--metrics-file`).

The text follows version 0.0.4 of its exposition format
(https://prometheus.io/docs/instrumenting/exposition_formats/). It changes at log events and evaluations.
"""

import errno
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from megatron.config import LoggingConfig
from megatron.errors import ConfigError
from megatron.files import write_text
from megatron.train.observation.observers import Record

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]
_OF_A_GROUP = "learning_rate_"  # prefix of the learning rates of groups of parameters


@dataclass(frozen=True)
class MetricFamily:
    """How Prometheus names and describes one number of the records."""

    name: str
    help: str
    unit: float = 1.0  # the record's unit in Prometheus' base unit: 2**30 for GiB, as Prometheus counts bytes

    @property
    def kind(self) -> str:
        """Its Prometheus type: a counter only grows over a run, a gauge goes up and down."""
        return "counter" if self.name.endswith("_total") else "gauge"


# Keys are those of the records. The first table has a value for each kind of record (train, valid, ...), the second the
# newest value of any record.
OF_EACH_KIND = {
    "loss": MetricFamily("loss", "Mean cross entropy of masked residues in nats."),
    "perplexity": MetricFamily("perplexity", "The exponential of the loss."),
    "masked_accuracy": MetricFamily("masked_accuracy_ratio", "Share of masked residues that were predicted right."),
}
OF_THE_RUN = {
    "iteration": MetricFamily("iterations_total", "Steps taken."),
    "num_iterations": MetricFamily("last_iteration", "The step at which the run ends."),
    "time_left_s": MetricFamily("time_left_seconds", "Time to the last step at the present pace."),
    "consumed_samples": MetricFamily("rows_total", "Rows trained on."),
    "consumed_residues": MetricFamily("residues_total", "Residues trained on."),
    "consumed_flops": MetricFamily("model_flops_total", "FLOPs that the model itself needed for them."),
    "training_s": MetricFamily("training_seconds_total", "Time spent on steps."),
    "num_skipped": MetricFamily("skipped_iterations_total",
                                "Steps since this start of the run that changed no weight."),
    "learning_rate": MetricFamily("learning_rate", "Learning rate; of a group of parameters where it has its own."),
    "weight_decay": MetricFamily("weight_decay", "Weight decay."),
    "grad_norm": MetricFamily("gradient_norm", "Norm of the gradient of the last step."),
    "loss_scale": MetricFamily("loss_scale", "Loss scale of fp16."),
    "global_batch_size": MetricFamily("batch_rows", "Rows of a step."),
    "tokens_per_s": MetricFamily("tokens_per_second", "Tokens trained on a second."),
    "residues_per_s": MetricFamily("residues_per_second", "Residues trained on a second."),
    "model_tflops": MetricFamily("model_flops_per_second", "FLOPs that the model itself needs, a second.", 1e12),
    "share_of_peak": MetricFamily("peak_flops_ratio", "The same as a share of the device's measured matrix peak."),
    "memory_gib": MetricFamily("memory_peak_bytes", "The most that a rank has held.", 2.0**30),
    "num_ranks": MetricFamily("ranks", "Processes that train together."),
    "written_s": MetricFamily("last_record_timestamp_seconds", "When the newest of these numbers was written."),
    "is_running": MetricFamily("running", "Whether the run goes on: 0 once it has ended, of itself or by an error."),
    "has_failed": MetricFamily("failed", "Whether it has ended by an error."),
}


class Exposition:
    """Keeps the newest value of each number. `run`: the value of the label "run" on all of them; "" for no label."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._of_kinds: dict[str, Record] = {}
        self._values: dict[str, Any] = {"is_running": 1, "has_failed": 0, "num_skipped": 0}

    def take(self, record: Record) -> None:
        """Replace older values by a record's; a number that is None there is not exposed until it is known again."""
        self._of_kinds[record["kind"]] = record
        skipped = self._values["num_skipped"] + record.get("skipped_iterations", 0)
        self._values |= {**record, "num_skipped": skipped}

    def end(self, has_failed: bool) -> None:
        """Note that the run has ended; `has_failed`: by an error."""
        self._values |= {"is_running": 0, "has_failed": int(has_failed)}

    def text(self) -> str:
        """All numbers in the exposition format."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, family in OF_EACH_KIND.items():
            yield from self._family(family, {(("kind", kind),): record[name] for kind, record in self._of_kinds.items()
                                             if name in record})
        for name, family in OF_THE_RUN.items():
            found: dict[Labels, float | None] = {(): self._values[name]} if name in self._values else {}
            if name == "learning_rate":
                found |= {(("group", key.removeprefix(_OF_A_GROUP)),): value for key, value in self._values.items()
                          if key.startswith(_OF_A_GROUP)}
            yield from self._family(family, found)

    def _family(self, family: MetricFamily, found: Mapping[Labels, float | None]) -> Iterator[str]:
        known = {labels: value for labels, value in found.items() if value is not None}
        name = f"proteinlm_{family.name}"
        if known:
            yield f"# HELP {name} {family.help}"
            yield f"# TYPE {name} {family.kind}"
        for labels, value in known.items():
            pairs = [*([("run", self._run)] if self._run else []), *labels]
            said = ",".join(f'{key}="{_escaped(text)}"' for key, text in pairs)
            yield f"{name}{f'{{{said}}}' if said else ''} {_number(family.unit * value)}"


def check_exposition(logging: LoggingConfig) -> None:
    """Raises ConfigError if `Prometheus` cannot serve or write what the flags say; leaves the file as it is."""
    if logging.metrics_file is not None:
        path = Path(logging.metrics_file)
        with _telling_of_failure(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            TemporaryFile(dir=path.parent).close()
    if logging.metrics_port is not None:
        _server(logging.metrics_host, logging.metrics_port, str).stop()


class Prometheus:
    """An observer that serves the text where the flags say; raises ConfigError if it cannot."""

    def __init__(self, logging: LoggingConfig, save: str | None, tell: Callable[[str], None]) -> None:
        self._exposition = Exposition("" if save is None else Path(save).resolve().name)
        self._text, self._tell, self._has_told = self._exposition.text(), tell, False
        self._server = None
        self._file = None if logging.metrics_file is None else Path(logging.metrics_file)
        if self._file is not None:
            with _telling_of_failure(self._file):
                write_text(self._file, self._text)
        if logging.metrics_port is not None:
            self._server = _server(logging.metrics_host, logging.metrics_port, lambda: self._text)
            host, port = self._server.server_address[:2]
            tell(f"Prometheus finds metrics at http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/metrics")

    def record(self, record: Record) -> None:
        """Expose its numbers from now on."""
        self._exposition.take(record)
        self._show()

    def close(self, has_failed: bool) -> None:
        """Stop serving; the file stays, and says that the run has ended, and whether by an error."""
        self._exposition.end(has_failed)
        self._show()
        if self._server is not None:
            self._server.stop()

    def _show(self) -> None:
        self._text = self._exposition.text()
        try:
            if self._file is not None:
                write_text(self._file, self._text)
        except OSError as error:
            if not self._has_told:
                self._has_told = True
                self._tell(f"note: --metrics-file {self._file} cannot be written ({error.strerror or error}); training "
                           "goes on")


class _Server(socketserver.ThreadingTCPServer):
    """A threaded HTTP server that, unlike http.server's, does not look up the host name of its own address."""

    allow_reuse_address = True  # take over the port of a run that has just ended
    daemon_threads = True

    def __init__(self, host: str, port: int, text: Callable[[], str]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.text = text
        super().__init__((host, port), _Handler)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0  # seconds that a client has to send its request
    server: _Server

    def do_GET(self) -> None:
        """Answer /metrics, and / for people with a browser; 404 for anything else."""
        is_known = self.path.partition("?")[0] in ("/", "/metrics")
        body = self.server.text().encode() if is_known else b"see /metrics\n"
        self.send_response(200 if is_known else 404)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log no requests: Prometheus sends one every 15 seconds or so."""


@contextmanager
def _telling_of_failure(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a ConfigError about `--metrics-file`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--metrics-file {path} cannot be written ({error.strerror or error}); name a file in a "
                          "folder that is there") from error


def _server(host: str, port: int, text: Callable[[], str]) -> _Server:
    try:
        server = _Server(host, port, text)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--metrics-port {port} is in use on {host}; give another, or 0 for one that is "
                              "free") from error
        raise ConfigError(f"--metrics-port {port} of --metrics-host {host} cannot be listened at "
                          f"({error.strerror or error}); give others") from error
    threading.Thread(target=server.serve_forever, name="--metrics-port", daemon=True).start()
    return server


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")


def _number(value: float) -> str:
    """In the notation of Go, which Prometheus uses: NaN, Inf."""
    return repr(float(value)).replace("nan", "NaN").replace("inf", "Inf")
