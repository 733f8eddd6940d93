"""A `python` that has loaded torch already: each command is a fork of one process. For tests that run many commands.

Loading torch is most of what a command on a tiny model takes. Nothing of the project is loaded beforehand: a command
takes that from where it runs. It has its own arguments, environment, folder, open files, signals and exit status, dies
where what was started in its place is killed (but SIGSTOP does not reach it), and starts others (`sys.executable`) in
the same way. Only scripts and modules that train, measure or convert go this way; whatever else is asked of `python` is
Python's as ever.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What the program, its optimizers and collectives import sooner or later.
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run", "torch.utils.tensorboard",
             "matplotlib.figure")
STAND_IN = """#!/bin/sh
[ "$1" != -u ] || shift
case "$1 $2" in
    "-c "*"print(sys.executable)") echo "$0"; exit ;;
    *tools/preprocess_data.py\\ *) ;;
    *pretrain_tape.py\\ * | *tools/*.py\\ * | *benchmarks/*.py\\ * | \\
    "-m megatron.parallel.launch" | "-m torch.distributed."*)
        exec "{python}" -I -S "{file}" ask "{place}" "$0" "$@" ;;
esac
exec "{python}" "$@"
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[None]:
    """Within this context `folder` holds `python` and `python3`."""
    place = folder / "socket"
    for name in ("python", "python3"):
        (folder / name).write_text(STAND_IN.format(python=sys.executable, file=__file__, place=place))
        (folder / name).chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, "serve", place], stdout=subprocess.PIPE) as server:
        assert server.stdout and server.stdout.readline() == b"ready\n"
        yield
        server.terminate()


def ask(place: str, *command: str) -> int:
    """Have `command` run, with what this process has; its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        request = json.dumps([command, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        process = int.from_bytes(connection.recv(8), "big")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda received, _: os.kill(process, received))
        return int.from_bytes(connection.recv(8), "big")


def serve(place: str) -> None:
    """Run what is asked for, until the end; in a fork this returns when that has run."""
    for module in PRELOADED:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen(16)
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not os.fork():
                break
            connection.close()
    _answer(connection)


def _answer(connection: socket.socket) -> None:
    """Run one command in a process of its own and tell its number and exit status."""
    size, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as reader:
        command, folder, environment = json.loads(reader.read(int.from_bytes(size, "big")))
    process = os.fork()
    if process:
        connection.sendall(process.to_bytes(8, "big"))
        threading.Thread(target=_kill_if_left, args=(connection, process), daemon=True).start()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        connection.sendall((status if status >= 0 else 128 - status).to_bytes(8, "big"))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _run(*command)


def _kill_if_left(connection: socket.socket, process: int) -> None:
    """Kill the process when who asked for it has been."""
    with suppress(OSError):  # both have ended
        if not connection.recv(1):
            os.kill(process, signal.SIGKILL)


def _run(executable: str, *arguments: str) -> None:
    import torch

    sys.executable = executable
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if arguments[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(*sys.argv[2:]))
    serve(*sys.argv[2:])
