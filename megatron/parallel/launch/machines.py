"""Where the launchers of several machines meet before they start ranks, with a line that names who is missing.

torchrun's own meeting, which follows, would wait for fifteen minutes and name nobody. It uses the same store, at
MASTER_ADDR and MASTER_PORT: in the launcher that keeps it, torch finds the one opened here by its port.
"""

import math
import socket
import sys
import threading
import time
import uuid
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.config.reading.files import read_file
from megatron.config.reading.presets import PRESETS
from megatron.errors import LaunchError
from megatron.parallel.launch.hosts import LOOPBACK, answers, is_own
from megatron.parallel.launch.meeting import store_at

LOOK_S = 0.2  # between two looks at what the others have written
TELL_AFTER_S = 10.0  # until a launcher tells for whom it waits
LONG_WAIT_S = 40.0  # longer than the half minute that an elastic start waits for more machines than it needs
OWN_ADDRESS_S = 5.0  # for machine 0 to reach itself by MASTER_ADDR
GREETING_S = 20.0  # for what listens at MASTER_ADDR to show that it is a launcher
READING_S = 1.0  # for the others to read why they are refused: the store ends with the launcher that keeps it
_ALL_HERE = "all are here"


class Missing:
    """A wait at `where` for other machines: it tells once who is missing, and ends after `timeout`."""

    def __init__(self, where: str, timeout: timedelta) -> None:
        self._where, self._timeout_s = where, timeout.total_seconds()
        self._began_s, self._is_told = time.monotonic(), False

    def look(self, who: Callable[[], str]) -> None:
        """Prints that `who()` is missing, if it is time to; raises DistStoreError once the time is up."""
        waited_s, limit = time.monotonic() - self._began_s, f"{self._timeout_s / 60:.3g} minutes"
        if waited_s > self._timeout_s:
            raise dist.DistStoreError(f"{limit} (--distributed-timeout-minutes) are up, and {who()} did not come to "
                                      f"{self._where}")
        if waited_s > TELL_AFTER_S and not self._is_told:
            self._is_told = True
            print(f"note: {socket.gethostname()} waits at {self._where} for {who()}, for at most {limit} "
                  "(--distributed-timeout-minutes)", file=sys.stderr, flush=True)


def timeout_of(arguments: Sequence[str]) -> timedelta:
    """How long machines wait for each other: --distributed-timeout-minutes among a program's arguments, or its default.

    It may also be in the file of --config. What cannot be understood is left for the program to refuse.
    """
    flags = ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--distributed-timeout-minutes", dest="minutes", nargs="?")
    flags.add_argument("--config", nargs="?")
    given, _ = flags.parse_known_args(arguments)
    with suppress(ValueError, OSError, OverflowError):
        of_file = {} if given.config is None else read_file(Path(given.config), PRESETS)
        minutes = float(given.minutes or of_file.get("distributed_timeout_minutes") or "nan")
        if 0 < minutes < math.inf:
            return timedelta(minutes=minutes)
    return timedelta(minutes=ParallelConfig().distributed_timeout_minutes)


def meet(number: int, num_machines: int, address: str, port: int, timeout: timedelta) -> dist.Store | None:
    """Waits until the launchers of all machines are here; returns the store on machine 0, which must hold it.

    `number`: this machine's (NODE_RANK). Raises LaunchError if two machines have the same, if `address` does not lead
    to machine 0, or if its port is taken; DistError if a machine does not come within `timeout`.
    """
    if not 0 <= number < num_machines:
        raise LaunchError(f"NODE_RANK is {number} and NNODES is {num_machines}: machines count from 0")
    missing, kept = Missing(f"{address}:{port}", timeout), None
    if number == 0:
        kept = _kept(port)
        if not answers(address, port, OWN_ADDRESS_S):
            raise LaunchError(f"NODE_RANK is 0 on {socket.gethostname()}, but MASTER_ADDR {address} does not lead "
                              "there; give every machine the address of machine 0, and its own NODE_RANK")
    store = dist.PrefixStore("machines", _found(address, port, missing, _named([0])))
    try:
        _register(store, number, num_machines, f"{address}:{port}")
        _wait_for_all(store, num_machines, missing)
    except (LaunchError, dist.DistStoreError) as error:
        store.compare_set("verdict", "", f"{type(error).__name__} {error}")
        time.sleep(READING_S if kept is not None else 0)
        raise
    return kept


def find(address: str, port: int, timeout: timedelta) -> dist.Store | None:
    """Waits for the store of machines without numbers; returns it on the machine of that address, which must hold it.

    Raises LaunchError if the port is taken, and DistError if nothing listens there within `timeout`.
    """
    if not is_own(address):
        _found(address, port, Missing(f"{address}:{port}", timeout), "the machine of that address")
        return None
    try:
        return _kept(port)
    except LaunchError:
        with suppress(LaunchError):  # another launcher of this machine may keep it
            _greeted(address, port)
            return None
        raise


@contextmanager
def telling_a_long_wait() -> Iterator[None]:
    """A context in which torch waits for machines: too few of an elastic start, or one that is lost at a restart."""
    note = f"note: {socket.gethostname()} waits for other machines: one may be missing, or its ranks still saving"
    timer = threading.Timer(LONG_WAIT_S, partial(print, note, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kept(port: int) -> dist.Store:
    """A store that this launcher keeps, for all addresses of this machine; raises LaunchError if the port is taken."""
    try:
        return dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise LaunchError(f"port {port} is taken on {socket.gethostname()}; set MASTER_PORT to a free "
                              "one") from error
        raise


def _found(address: str, port: int, missing: Missing, who: str) -> dist.Store:
    """The store at that address, once something listens there; raises LaunchError if it is no store."""
    while not answers(address, port, LOOK_S):
        missing.look(lambda: who)
    return _greeted(address, port)


def _greeted(address: str, port: int) -> dist.Store:
    """The store at an address where something listens; raises LaunchError if that is no store."""
    try:
        return store_at(address, port, timedelta(seconds=GREETING_S))
    except dist.DistError as error:
        raise LaunchError(f"something listens at {address}:{port}, but no launcher; set MASTER_PORT, on all machines, "
                          "to a port that is free on the machine of that address") from error


def _register(store: dist.Store, number: int, num_machines: int, where: str) -> None:
    """Enters this machine; raises LaunchError if another one has its number."""
    own = f"{socket.gethostname()} {uuid.uuid4().hex}"
    first = store.compare_set(f"number/{number}", "", own).decode()
    if first != own:
        raise LaunchError(f"{first.split()[0]} and {socket.gethostname()} both have NODE_RANK {number}, and meet at "
                          f"{where}; give each machine its own, from 0 to {num_machines - 1}")
    if store.add("num_machines", 1) == num_machines:
        store.compare_set("verdict", "", _ALL_HERE)


def _wait_for_all(store: dist.Store, num_machines: int, missing: Missing) -> None:
    """Waits for the verdict; raises LaunchError or DistStoreError as the machine did that found what is wrong.

    It does not wait inside torch, which would print a warning after each step.
    """
    def who() -> str:
        return _named([number for number in range(num_machines) if not store.check([f"number/{number}"])])

    while not store.check(["verdict"]):
        missing.look(who)
        time.sleep(LOOK_S)
    verdict = store.get("verdict").decode()
    if verdict != _ALL_HERE:
        kind, _, line = verdict.partition(" ")
        raise LaunchError(line) if kind == LaunchError.__name__ else dist.DistStoreError(line)


def _named(numbers: Sequence[int]) -> str:
    """The machines with these numbers, in words."""
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"the machine{'s' if len(numbers) > 1 else ''} with NODE_RANK {', '.join(map(str, numbers[:8]))}{more}"
