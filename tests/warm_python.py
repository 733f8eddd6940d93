"""A stand-in for `python` whose commands start with torch already loaded, for tests that run many commands.

Loading torch takes most of the time of a command on a tiny model. Here one server process loads it once, and each
command runs in a fork of the server. Nothing of the project is loaded beforehand: a command imports that from where it
runs. It has its own arguments, environment, working directory, open files, signals and exit status, and it starts other
commands (`sys.executable`) in the same way. It is killed when the process that the test started is killed; SIGSTOP does
not reach it. Its pictures are not drawn (`begin_png`) unless its environment has DRAWS. Only the project's scripts,
benchmarks and launchers, except preprocessing, and `-c "…import torch; …"`, by which the example scripts count GPUs,
run like this; any other command line runs in the ordinary Python.
"""

import gc
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
from io import BytesIO
from pathlib import Path
from typing import Any

# Everything slow to load that the program, its optimizers and collectives import sooner or later.
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run", "torch.utils.tensorboard",
             "matplotlib.figure")
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of every PNG
# The script called `python`: decides which command lines run in a fork of the server.
STAND_IN = """#!/bin/sh
[ "$1" != -u ] || shift
case "$1 $2" in
    "-c "*"print(sys.executable)") echo "$0"; exit ;;
    *tools/preprocess_data.py\\ *) ;;
    *pretrain_tape.py\\ * | *tools/*.py\\ * | *benchmarks/*.py\\ * | \\
    "-m megatron.parallel.launch" | "-m torch.distributed."* | "-c import signal; "*"import torch; "*)
        exec "{python}" -I -S "{file}" ask "{place}" "$0" "$@" ;;
esac
exec "{python}" "$@"
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[None]:
    """Within this context the stand-ins `folder`/python and `folder`/python3 work."""
    place = folder / "socket"
    for name in ("python", "python3"):
        (folder / name).write_text(STAND_IN.format(python=sys.executable, file=__file__, place=place))
        (folder / name).chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, "serve", place], stdout=subprocess.PIPE) as server:
        assert server.stdout and server.stdout.readline() == b"ready\n"
        yield
        server.terminate()


def begin_png(_: Any, file: BytesIO | Path, **options: Any) -> None:
    """Stands for matplotlib's Figure.savefig: draws nothing, and writes a PNG's first bytes.

    Drawing takes two thirds of the time of a run of a few steps.
    """
    if isinstance(file, BytesIO):
        file.write(PNG)
    else:
        file.write_bytes(PNG)


def ask(place: str, *command: str) -> int:
    """Have the server run `command` with this process's files, environment and directory; returns its exit status.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the command.
    """
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
    """Serve requests at the socket `place` until terminated; in a fork, return after running one command."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # or each command would, at its end, spend more than a second on looking for garbage in torch
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
    """Run one command in its own process; send its process id, then its exit status, to the process that asked."""
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
    """Kill the command when the process that asked for it has been killed."""
    with suppress(OSError):  # both have ended
        if not connection.recv(1):
            os.kill(process, signal.SIGKILL)


def _run(executable: str, *arguments: str) -> None:
    """Run a script, or with -m a module, or with -c a program, in this process, as `executable` would."""
    import torch
    from matplotlib.figure import Figure

    if "DRAWS" not in os.environ:
        Figure.savefig = begin_png  # type: ignore[method-assign, assignment]
    sys.executable = executable
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if arguments[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(*sys.argv[2:]))
    serve(*sys.argv[2:])
