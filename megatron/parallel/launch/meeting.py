"""The store in which the ranks of one start meet, and how they tell this start from an earlier one."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from megatron.parallel.launch.environment import Launch


def meeting_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store through which the ranks find each other; all ranks call this, after `check_launch`.

    Raises `DistError` if the others do not come within `timeout`.
    """
    address, port = str(launch.master_addr), int(launch.master_port or 0)
    if launch.has_agent:
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
        return dist.PrefixStore(_name_of_this_start(store, launch, timeout), store)
    return dist.TCPStore(address, port, launch.size, is_master=launch.rank == 0, timeout=timeout, multi_tenant=True)


def _name_of_this_start(store: dist.Store, launch: Launch, timeout: timedelta) -> str:
    """A name shared by the ranks of this start alone.

    An agent's store still holds what ranks wrote before a restart, such as the addresses of dead ones.
    TORCHELASTIC_RESTART_COUNT cannot distinguish starts, since it may differ between hosts: one whose own ranks did not
    fail does not count. So each rank greets rank 0 with a fresh word, and gets the name in the answer to that word.
    """
    if launch.rank > 0:
        word = uuid.uuid4().hex
        store.set(f"hello/{launch.rank}", word)
        _wait_for(store, f"answer/{word}", timeout)
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/{launch.rank}", "")
        return name
    name, deadline_s = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while missing := [rank for rank in range(1, launch.size) if not store.check([f"{name}/{rank}"])]:
        if time.monotonic() > deadline_s:
            raise dist.DistStoreError(f"timed out waiting for ranks {', '.join(map(str, missing))} to start")
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"answer/{store.get(f'hello/{rank}').decode()}", name)
        time.sleep(0.01)
    return name


def _wait_for(store: dist.Store, key: str, timeout: timedelta) -> None:
    """Waits for a key, in steps of a second, since Python handles signals only in between."""
    deadline_s = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            return store.wait([key], min(timeout, timedelta(seconds=1)))
        except dist.DistStoreError:
            if time.monotonic() > deadline_s:
                raise
