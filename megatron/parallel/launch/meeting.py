"""The store in which the ranks of one start meet, and how they tell this start from an earlier one.

Ranks may wait here for hours until another host starts its own, and Python handles signals, such as Ctrl-C, only
between calls of torch: so no call waits longer than a second.
"""

import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from megatron.errors import LaunchError
from megatron.parallel.launch.environment import Launch
from megatron.parallel.launch.hosts import answers

STEP_S = 1.0
_MET = "all have met"


def meeting_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store through which the ranks find each other, once all have come; all ranks call this, after `check_launch`.

    Raises `DistError` if the others do not come within `timeout`, and LaunchError if another run has met there.
    """
    address, port = str(launch.master_addr), int(launch.master_port or 0)
    deadline_s = time.monotonic() + timeout.total_seconds()
    keeps = launch.rank == 0 and not launch.has_agent
    if not keeps and not answers(address, port, timeout.total_seconds()):
        raise dist.DistNetworkError(f"timed out waiting for rank 0 to listen at {address}, port {port}")
    store = store_at(address, port, timeout, keeps)
    own = dist.PrefixStore(_name_of_this_start(store, launch, deadline_s), store)
    if launch.rank == 0:
        store.set(_MET, "")
        own.set("all are here", "")
    _wait_for(own, "all are here", deadline_s)  # what follows waits inside torch for those that are not
    return own


def store_at(address: str, port: int, timeout: timedelta, keeps: bool = False) -> dist.Store:
    """The store at an address; `keeps`: whether this process keeps it there. Raises `DistError` after `timeout`.

    A thread connects: torch would wait for as long as what listens there does not answer its greeting.
    """
    found = list[dist.Store | dist.DistError]()

    def connect() -> None:
        try:
            found.append(dist.TCPStore(address, port, is_master=keeps, timeout=timeout, wait_for_workers=False,
                                       multi_tenant=keeps))
        except dist.DistError as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds())
    if not found:
        raise dist.DistNetworkError(f"timed out waiting for an answer at {address}, port {port}: something listens "
                                    "there, perhaps another program")
    if isinstance(found[0], dist.DistError):
        raise found[0]
    return found[0]


def _name_of_this_start(store: dist.Store, launch: Launch, deadline_s: float) -> str:
    """A name shared by the ranks of this start alone.

    An agent's store still holds what ranks wrote before a restart, such as the addresses of dead ones.
    TORCHELASTIC_RESTART_COUNT cannot distinguish starts, since it may differ between hosts: one whose own ranks did not
    fail does not count. So each rank greets rank 0 with a fresh word, and gets the name in the answer to that word.
    """
    if launch.rank > 0:
        word = uuid.uuid4().hex
        store.set(f"hello/{launch.rank}", word)
        _wait_for(store, f"answer/{word}", deadline_s, partial(_refuse_another_run, store, launch))
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/{launch.rank}", "")
        return name
    name = uuid.uuid4().hex
    while missing := [rank for rank in range(1, launch.size) if not store.check([f"{name}/{rank}"])]:
        if time.monotonic() > deadline_s:
            raise dist.DistStoreError(f"timed out waiting for rank{'s' if len(missing) > 1 else ''} "
                                      f"{', '.join(map(str, missing))} to start")
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"answer/{store.get(f'hello/{rank}').decode()}", name)
        time.sleep(0.01)
    return name


def _refuse_another_run(store: dist.Store, launch: Launch) -> None:
    """Raises LaunchError if all ranks have met in this store, and so without this one.

    An agent's store is that of its own ranks, which may have met there before a restart.
    """
    if not launch.has_agent and store.check([_MET]):
        raise LaunchError(f"another run has met at {launch.master_addr}, port {launch.master_port}; set MASTER_PORT to "
                          "a free one")


def _wait_for(store: dist.Store, key: str, deadline_s: float, look: Callable[[], None] = lambda: None) -> None:
    """Waits for a key, and calls `look` every STEP_S seconds meanwhile.

    Raises DistStoreError if the key does not come until `deadline_s`, by the monotonic clock.
    """
    while True:
        try:
            return store.wait([key], timedelta(seconds=min(STEP_S, max(0.01, deadline_s - time.monotonic()))))
        except dist.DistStoreError:
            if time.monotonic() > deadline_s:
                raise
            look()
