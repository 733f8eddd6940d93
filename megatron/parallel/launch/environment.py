"""Reads a process's rank from the environment variables of its launcher; no other module reads the environment.

Known launchers: torchrun (and torch.distributed.launch), mpirun of Open MPI, MPICH and Intel MPI, and SLURM's srun. If
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
    """This process's place among `size` ranks, and where they meet."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None  # on this host; None if the launcher does not say
    master_addr: str | None = None  # where rank 0, or torchrun's agent, listens for the others
    master_port: int | None = None
    launcher: str = "none"
    is_heard: bool = False  # the launcher prints why ranks failed, so they need not
    has_agent: bool = False  # at that address torchrun's agent listens, which outlives restarts of the ranks
    is_on_one_host: bool = False  # all ranks are on this host

    def speaks(self) -> bool:
        """Whether this rank prints what all ranks know: one per host under torchrun, whose output is per host."""
        has_own_output = self.launcher == "torchrun" and self.local_rank is not None
        return (self.local_rank if has_own_output else self.rank) == 0

    def speaks_for_host(self) -> bool:
        """Whether this rank prints what all ranks of this host know, and those of other hosts may not."""
        return self.local_rank in (0, None)


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's place according to its environment; one rank if there was no launcher. Raises LaunchError."""
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
    """Raises LaunchError if the ranks could not find each other: no address, a wrong one, or a wrong port."""
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
    """Whether this process is the only rank, according to its environment."""
    try:
        return launched().size == 1
    except LaunchError:
        return True


def status_file() -> str | None:
    """The file into which a batch script wants the exit status of a rank that must not be restarted; None without."""
    return os.environ.get("EXIT_STATUS_FILE")


# The variables that each launcher sets, innermost launcher first: the rank, the number of ranks, the local rank.
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
# Jobs that share a host meet at different ports if one of these variables distinguishes them. MPICH sets none.
_JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "I_MPI_HYDRA_UUID", "SLURM_JOB_ID", "SLURM_STEP_ID")
_DEFAULT_PORT = 6000


def _meeting_place(launcher: str, environment: Mapping[str, str], size: int) -> tuple[str | None, int | None]:
    """Address and port of rank 0: the user's, or derived from the launcher's variables; None if that is impossible.

    With all ranks on one host it is the loopback address, whatever name the host has.
    """
    address = environment.get("MASTER_ADDR")
    port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None
    is_on_one_host = environment.get(_RANKS_ON_HOST.get(launcher, "")) == str(size)
    if launcher != "srun":  # on some hosts an MPI's ranks are in the step of its daemons, on others in none
        environment = {key: value for key, value in environment.items() if not key.startswith("SLURM_STEP_")}
    nodes = next((key for key in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if key in environment), None)
    if address is None and launcher != "torchrun" and not is_on_one_host and nodes is not None:
        first = _first_host(environment[nodes], nodes)
        is_on_one_host = first == environment[nodes]
        address = None if is_on_one_host else first
    if is_on_one_host and (address is None or launcher == "torchrun"):  # torchrun sets it to the name of this host
        address = LOOPBACK
    if launcher == "torchrun":
        return address, port
    if port is None:
        names = [environment[name] for name in _JOB_NAMES if name in environment]
        # Below 32768, from where on Linux assigns ports to connections.
        port = 10_000 + zlib.crc32("/".join(names).encode()) % 20_000 if names else _DEFAULT_PORT
    return address, port


def _first_host(hosts: str, key: str) -> str:
    """The first of SLURM's list of `hosts`: node01 of node[01-03,07],gpu5."""
    match = re.match(r"(?:[^][,]|\[\d[^][]*\])+(?=,|$)", hosts)
    if match is None:
        raise LaunchError(f"{key} is {hosts!r}, in which no first host can be found; set MASTER_ADDR to rank 0's host")
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", match[0])


def _number(environment: Mapping[str, str], key: str) -> int:
    text = environment[key]
    if not re.fullmatch(r"[0-9]+", text):
        raise LaunchError(f"{key} is {text!r} in the environment, where a whole number should be")
    return int(text)
