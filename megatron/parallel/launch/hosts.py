"""Checks that host names resolve, and ports answer: torch would retry for minutes, and not say which name is wrong."""

import os
import socket
import sys
import threading
import time
from collections.abc import MutableMapping
from contextlib import suppress
from ipaddress import ip_address

from megatron.errors import LaunchError

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
LOOKUP_S = 30  # a resolver whose servers do not answer may take minutes


def check_address(address: str) -> None:
    """Raises LaunchError if the address of rank 0's host does not resolve."""
    if not addresses_of(address):
        raise LaunchError(f"MASTER_ADDR is {address!r}, and {socket.gethostname()} knows no host of that name; give "
                          f"rank 0's host by a name that resolves, or by its IP address (on one host: {LOOPBACK})")


def choose_interface(is_on_one_host: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes sure that gloo finds an address for this host; by default it resolves the host's own name.

    On one host it sets the loopback interface, unless the user has chosen another. Raises LaunchError if the user's
    interfaces have no address, or if with several hosts what is used does not lead to the others.
    """
    given = environment.get("GLOO_SOCKET_IFNAME")
    if given:
        _check_interfaces(given, is_on_one_host)
    elif is_on_one_host:
        environment["GLOO_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
    elif all(map(is_loopback, addresses_of(socket.gethostname()))):
        raise LaunchError(f"{socket.gethostname()} finds no address for other hosts by its own name; set "
                          "GLOO_SOCKET_IFNAME to the network interface that leads to them, or mend /etc/hosts")


def _check_interfaces(given: str, is_on_one_host: bool) -> None:
    """Raises LaunchError if gloo cannot use one of the interfaces, whose names are separated by commas."""
    for name in given.split(","):
        if has_address(name) and (is_on_one_host or name != LOOPBACK_INTERFACE):
            continue
        usable = [other for _, other in socket.if_nameindex() if other != LOOPBACK_INTERFACE and has_address(other)]
        fault = "leads to no other host" if name == LOOPBACK_INTERFACE else "has no address, or does not exist"
        remedy = "unset it" if is_on_one_host else ("set the one that leads to the other hosts, or MASTER_ADDR="
                                                    f"{LOOPBACK} if all ranks are on this host")
        raise LaunchError(f"GLOO_SOCKET_IFNAME is {given!r}, and {name!r} {fault}; {remedy} "
                          f"(interfaces with an address: {', '.join(usable) or 'none'})")


def has_address(interface: str) -> bool:
    """Whether gloo finds an address of that network interface."""
    from torch.distributed import ProcessGroupGloo  # not above: tools/doctor.py runs without torch

    try:
        ProcessGroupGloo.create_device(interface=interface)
    except (RuntimeError, ValueError):  # an empty name
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether an address is a loopback address, or the name localhost."""
    try:
        return ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def is_own(address: str) -> bool:
    """Whether a name or an address is one of this host."""
    for number in addresses_of(address):
        family = socket.AF_INET6 if ":" in number else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as test:
            test.bind((number, 0))
            return True
    return False


def answers(address: str, port: int, within_s: float) -> bool:
    """Whether something listens at that port, now or within that many seconds; it looks ten times a second."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        with suppress(OSError), socket.create_connection((address, port), timeout=1):
            return True
        time.sleep(0.1)
    return False


def addresses_of(name: str) -> set[str]:
    """The IP addresses of a host; empty if its name does not resolve within LOOKUP_S seconds."""
    found = set[str]()

    def look_up() -> None:
        with suppress(OSError, UnicodeError):  # unknown; no name at all, such as a..b
            found.update(str(info[4][0]) for info in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOKUP_S)
    return set(found)
