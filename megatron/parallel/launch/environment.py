"""Where a process learns its place among the ranks that a launcher started; the environment is read here alone.

Understood are torchrun (and torch.distributed.launch), mpirun of Open MPI, MPICH and Intel MPI, and SLURM's srun. Where
several have left their variables, the innermost counts: torchrun inside srun, mpirun inside a SLURM allocation.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.errors import LaunchError
from megatron.parallel.launch.hosts import LOOPBACK, check_address, is_loopback


@dataclass(frozen=True)
class Launch:
    """This process among `size` ranks, and where the first of them listens for the others.

    `local_rank` counts on this host; None where nothing says. `is_heard`: the launcher prints why ranks failed.
    `has_agent`: torchrun's agent listens there, in the place of rank 0, and goes on to over restarts. `is_on_one_host`:
    all ranks are here.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    launcher: str = "none"
    is_heard: bool = False
    has_agent: bool = False
    is_on_one_host: bool = False

    def speaks(self) -> bool:
        """Whether this rank says what all ranks find alike: torchrun has an output a host, the others have one."""
        has_own_output = self.launcher == "torchrun" and self.local_rank is not None
        return (self.local_rank if has_own_output else self.rank) == 0

    def speaks_for_host(self) -> bool:
        """Whether this rank says what all ranks of this host find alike, and those of other hosts may not."""
        return self.local_rank in (0, None)


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's place as its launcher left it in the environment; one rank where there was no launcher."""
    launcher = next((name for name, needed in _NEEDED.items() if all(key in environment for key in needed)), None)
    if launcher is None:
        for given, missing in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
            if given in environment:
                raise LaunchError(f"{given} is set in the environment and {missing} is not: set both, or neither")
        return Launch()
    rank_key, size_key, *_ = _NEEDED[launcher]
    rank, size = _number(environment, rank_key), _number(environment, size_key)
    if rank >= size:
        raise LaunchError(f"{rank_key} is {rank} and {size_key} is {size} in the environment: ranks count from 0")
    local_key = next((key for key in (*_NEEDED[launcher][2:], "LOCAL_RANK") if key in environment), None)
    address, port = (None, None) if size == 1 else _meeting_place(launcher, environment, size)
    return Launch(rank, size, None if local_key is None else _number(environment, local_key), address, port, launcher,
                  is_heard=environment.get("RANKS_REPORT_TO_LAUNCHER") == "1",
                  has_agent=launcher == "torchrun" and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                  is_on_one_host=address is not None and is_loopback(address))


def check_launch(launch: Launch) -> None:
    """Raises LaunchError where the ranks could not find each other."""
    if launch.master_port is not None and not 0 < launch.master_port < 2**16:
        raise LaunchError(f"MASTER_PORT is {launch.master_port}; a port is between 1 and 65535")
    if launch.master_addr is not None and launch.master_port is not None:
        return check_address(launch.master_addr)
    if launch.size == 1:
        return None
    if launch.launcher == "torchrun":
        raise LaunchError(f"RANK and WORLD_SIZE ask for {launch.size} ranks; set MASTER_ADDR and MASTER_PORT too, the "
                          "address of rank 0's host and a free port there")
    raise LaunchError(f"{launch.launcher} started {launch.size} ranks, not all on this host; pass MASTER_ADDR, the "
                      "address of rank 0's host, to all of them: mpirun … env MASTER_ADDR=… python …")


def is_alone() -> bool:
    """Whether this process is the only rank, as far as its environment says."""
    try:
        return launched().size == 1
    except LaunchError:
        return True


def status_file() -> str | None:
    """Where a batch script asks for the exit status of a rank whose failure is not to be tried again, if one does."""
    return os.environ.get("EXIT_STATUS_FILE")


# What marks a process of each launcher, the innermost first: its rank, the number of ranks, and its rank on its host.
# A batch script of SLURM has SLURM_PROCID 0 and SLURM_NTASKS of the whole job: only srun sets SLURM_STEP_NUM_TASKS.
# srun --mpi=pmi2 sets PMI_RANK as well, without a rank on the host.
_NEEDED: dict[str, tuple[str, ...]] = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "PMI": ("PMI_RANK", "PMI_SIZE"),
}
_RANKS_ON_HOST = {"torchrun": "LOCAL_WORLD_SIZE", "Open MPI": "OMPI_COMM_WORLD_LOCAL_SIZE",
                  "MPICH or Intel MPI": "MPI_LOCALNRANKS"}
# Jobs that share a host meet at different ports if something tells them apart.
_JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID")
_DEFAULT_PORT = 6000


def _meeting_place(launcher: str, environment: Mapping[str, str], size: int) -> tuple[str | None, int | None]:
    """Address and port of rank 0: the user's, or what the launcher lets us conclude; None where it does not.

    Where all ranks are on this host, it does not matter under which name others know it.
    """
    address = environment.get("MASTER_ADDR")
    port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None
    is_on_one_host = environment.get(_RANKS_ON_HOST.get(launcher, "")) == str(size)
    nodes = next((key for key in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if key in environment), None)
    if address is None and launcher == "srun" and nodes is not None:
        first = _first_host(environment[nodes], nodes)
        is_on_one_host = first == environment[nodes]
        address = None if is_on_one_host else first
    if is_on_one_host and (address is None or launcher == "torchrun"):  # whose address is the name of this host
        address = LOOPBACK
    if launcher == "torchrun":
        return address, port
    if port is None:
        names = [environment[name] for name in _JOB_NAMES if name in environment]
        # Below 32768, where Linux begins to hand out ports by itself.
        port = 10_000 + zlib.crc32("/".join(names).encode()) % 20_000 if names else _DEFAULT_PORT
    return address, port


def _first_host(hosts: str, key: str) -> str:
    """The first of SLURM's `hosts`, such as node[01-03,07],gpu5: node01."""
    match = re.match(r"(?:[^][,]|\[\d[^][]*\])+(?=,|$)", hosts)
    if match is None:
        raise LaunchError(f"{key} is {hosts!r}, in which no first host can be found; set MASTER_ADDR to rank 0's host")
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", match[0])


def _number(environment: Mapping[str, str], key: str) -> int:
    text = environment[key]
    if not re.fullmatch(r"[0-9]+", text):
        raise LaunchError(f"{key} is {text!r} in the environment, where a whole number should be")
    return int(text)
