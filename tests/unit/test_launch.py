"""How a rank learns its place from the variables that launchers set, and where ranks meet."""

import os
import socket
import sys
import threading
from contextlib import closing
from datetime import timedelta
from errno import EACCES, EFBIG, ENOENT, ENOSPC

import pytest
import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.errors import LaunchError
from megatron.log import exit_status
from megatron.parallel.launch import hosts as hosts_module
from megatron.parallel.launch.agent import listens, prepared
from megatron.parallel.launch.environment import Launch, check_launch, launched
from megatron.parallel.launch.hosts import addresses_of, choose_interface
from megatron.parallel.launch.leaving import leave
from megatron.parallel.launch.meeting import meeting_store
from megatron.parallel.mesh import device_of
from megatron.parallel.program import status_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_ess_base_jobid": "581763073"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
# A batch script sees the job; only what srun starts is a task of a step.
SLURM_JOB = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
             "SLURM_JOB_NODELIST": "node[07-09]"}
SRUN = SLURM_JOB | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0",
                    "SLURM_STEP_NODELIST": "node[08-09]"}


@pytest.fixture(autouse=True)
def known_hosts(monkeypatch):
    """Every name that these tests use belongs to a host, but for those of `nosuch`; gives the table."""
    hosts = {"nosuch": set(), "debian": {"127.0.1.1"}}
    monkeypatch.setattr(hosts_module, "addresses_of", lambda name: hosts.get(name, {"10.0.0.1"}))
    return hosts


def place(environment):
    launch = launched(environment)
    check_launch(launch)
    return launch.rank, launch.size, launch.local_rank, launch.master_addr


def error_of(environment):
    with pytest.raises(LaunchError) as caught:
        check_launch(launched(environment))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, (0, 1, None, None)),
    (TORCHRUN, (3, 4, 1, "node0")),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, (3, 4, 1, "127.0.0.1")),
    (OPEN_MPI, (3, 4, 3, "127.0.0.1")),
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node0"}, (3, 4, 3, "node0")),
    (MPICH, (3, 4, 3, "127.0.0.1")),
    (SRUN, (3, 4, 1, "node08")),
    (SRUN | {"SLURM_STEP_NODELIST": "node08"}, (3, 4, 1, "127.0.0.1")),
    (SRUN | {"MASTER_ADDR": "ib-node08"}, (3, 4, 1, "ib-node08")),
    (SLURM_JOB, (0, 1, None, None)),
    (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0, None)),
], ids=["none", "torchrun", "torchrun-one-host", "open-mpi", "open-mpi-hosts", "mpich", "srun", "srun-one-host",
        "srun-address", "sbatch", "srun-one"])
def test_every_launcher_is_understood(environment, expected):
    assert place(environment) == expected


@pytest.mark.parametrize(("environment", "launcher"), [
    (SRUN | TORCHRUN, "torchrun"), (OPEN_MPI | TORCHRUN, "torchrun"), (SLURM_JOB | OPEN_MPI, "Open MPI"),
    (SLURM_JOB | MPICH, "MPICH or Intel MPI"), (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun")])
def test_the_innermost_launcher_counts(environment, launcher):
    assert launched(environment).launcher == launcher


@pytest.mark.parametrize(("hosts", "first"), [
    ("node[08-09,11]", "node08"), ("gpu[3,7],node1", "gpu3"), ("a,b[1-2]", "a"),
    ("rack[1-2]-node[03-04]", "rack1-node03"), ("n-1.cluster.org,n-2.cluster.org", "n-1.cluster.org")])
def test_rank_0_of_srun_is_on_the_first_host(hosts, first):
    assert place(SRUN | {"SLURM_STEP_NODELIST": hosts})[3] == first


@pytest.mark.parametrize("of_mpi", [OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, MPICH | {"MPI_LOCALNRANKS": "2"},
                                    {"PMI_RANK": "3", "PMI_SIZE": "4"}], ids=["open-mpi", "mpich", "pmi"])
def test_ranks_of_an_mpi_in_a_slurm_job_meet_on_its_first_host_whether_or_not_they_are_in_a_step(of_mpi):
    job = {key: SLURM_JOB[key] for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST")} | of_mpi
    daemons = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[08-09]"}
    assert place(job)[3] == place(job | daemons)[3] == "node07"
    assert launched(job).master_port == launched(job | daemons).master_port
    assert place(job | {"MASTER_ADDR": "node08"})[3] == "node08"


def test_ranks_of_an_mpi_on_one_host_of_a_slurm_job_need_no_name():
    assert place(SLURM_JOB | OPEN_MPI)[3] == place(SLURM_JOB | MPICH)[3] == "127.0.0.1"


def test_runs_of_intel_mpi_on_one_host_meet_at_different_ports():
    assert len({launched(MPICH | {"I_MPI_HYDRA_UUID": uuid}).master_port for uuid in ("e24-8be3", "eb4-149c")}) == 2


def test_a_job_meets_at_a_port_of_its_own():
    ports = [launched(SRUN | {"SLURM_JOB_ID": str(job)}).master_port for job in range(100)]
    assert len(set(ports)) > 95
    assert all(1024 < port < 32768 for port in ports)
    assert launched(SRUN).master_port == launched(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).master_port
    assert launched(SRUN | {"MASTER_PORT": "6001"}).master_port == 6001


@pytest.mark.parametrize(("environment", "said"), [
    (TORCHRUN | {"RANK": "two"}, "RANK is 'two' in the environment, where a whole number should be"),
    (TORCHRUN | {"RANK": ""}, "RANK is ''"),
    (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    (TORCHRUN | {"RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4"),
    ({"RANK": "0"}, "WORLD_SIZE is not"),
    ({"WORLD_SIZE": "2"}, "RANK is not"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "set MASTER_ADDR and MASTER_PORT too"),
    (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; a port is between 1 and 65535"),
    (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    (TORCHRUN | {"MASTER_ADDR": "nosuch"}, f"MASTER_ADDR is 'nosuch', and {socket.gethostname()} knows no host"),
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "pass MASTER_ADDR, the address of rank 0's host"),
    (SRUN | {"SLURM_STEP_NODELIST": "node["}, "SLURM_STEP_NODELIST is 'node['"),
])
def test_what_cannot_be_understood_is_refused_in_one_line(environment, said):
    assert said in error_of(environment)


def test_what_all_find_alike_is_said_once_a_host_by_torchrun_and_once_by_the_others():
    torchrun = [launched(TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}) for rank in range(4)]
    assert [launch.speaks() for launch in torchrun] == [True, False, True, False]
    srun = [launched(SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}) for rank in range(4)]
    assert [launch.speaks() for launch in srun] == [True, False, False, False]
    assert Launch().speaks()


def test_what_the_ranks_of_one_host_find_is_said_once_there():
    srun = [launched(SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}) for rank in range(4)]
    assert [launch.speaks_for_host() for launch in srun] == [True, False, True, False]


def test_a_name_that_no_host_has_resolves_to_nothing():
    assert addresses_of("no-such-host.invalid") == addresses_of("a..b") == set()
    assert addresses_of("127.0.0.1") == {"127.0.0.1"}


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch):
    has_ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: has_ended.wait() and [])
    monkeypatch.setattr(hosts_module, "LOOKUP_S", 0.01)
    assert addresses_of("node0") == set()
    has_ended.set()


@pytest.mark.parametrize(("own_name", "is_on_one_host", "interface"), [
    ("nosuch", True, "lo"), ("node1", False, None)], ids=["one-host", "two-hosts"])
def test_gloo_needs_the_own_name_only_to_reach_other_hosts(monkeypatch, own_name, is_on_one_host, interface):
    monkeypatch.setattr(socket, "gethostname", lambda: own_name)
    environment = {}
    choose_interface(is_on_one_host, environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == interface


@pytest.mark.parametrize("own_name", ["nosuch", "debian"])  # Debian enters a host's own name as 127.0.1.1
def test_an_own_name_that_others_cannot_use_is_refused_in_one_line(monkeypatch, own_name):
    monkeypatch.setattr(socket, "gethostname", lambda: own_name)
    with pytest.raises(LaunchError, match=f"{own_name} finds no address for other hosts .* set GLOO_SOCKET_IFNAME"):
        choose_interface(False, {})
    monkeypatch.setattr(hosts_module, "has_address", lambda _: True)
    choose_interface(False, {"GLOO_SOCKET_IFNAME": "eth1"})


@pytest.mark.parametrize(("given", "is_on_one_host", "said"), [
    ("eth77", True, "GLOO_SOCKET_IFNAME is 'eth77', and 'eth77' has no address, or does not exist; unset it"),
    ("lo,eth77", True, "GLOO_SOCKET_IFNAME is 'lo,eth77', and 'eth77' has no address"),
    ("lo,", True, "GLOO_SOCKET_IFNAME is 'lo,', and '' has no address"),
    ("eth77", False, "set the one that leads to the other hosts"),
    ("lo", False, "GLOO_SOCKET_IFNAME is 'lo', and 'lo' leads to no other host")])
def test_an_interface_that_gloo_cannot_use_is_refused_in_one_line(given, is_on_one_host, said):
    with pytest.raises(LaunchError, match=said) as caught:
        choose_interface(is_on_one_host, {"GLOO_SOCKET_IFNAME": given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "chosen"), [("lo", "lo"), ("", "lo")])
def test_on_one_host_the_loopback_interface_serves(given, chosen):
    environment = {"GLOO_SOCKET_IFNAME": given}
    choose_interface(True, environment)
    assert environment == {"GLOO_SOCKET_IFNAME": chosen}


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes this process see so many GPUs; gives the list of those that were made current."""
    def see(count):
        current = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return see


@pytest.mark.parametrize(("environment", "flag", "num_gpus", "index"), [
    ({}, None, 8, 0), (TORCHRUN, None, 8, 1), (SRUN, None, 8, 1), (OPEN_MPI, None, 4, 3),
    (SRUN, None, 1, 0),  # --gpus-per-task: each task sees its own
    ({key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}, 5, 8, 5),
    (TORCHRUN, 5, 8, 1),
], ids=["none", "torchrun", "srun", "open-mpi", "one-gpu-a-task", "flag", "environment-over-flag"])
def test_a_rank_takes_the_gpu_of_its_local_rank(gpus, environment, flag, num_gpus, index):
    current = gpus(num_gpus)
    assert device_of(launched(environment), flag) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


def test_gpus_that_pytorch_cannot_use_are_not_passed_over(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="shows 2 GPUs that PyTorch .* cannot use .* hide them: CUDA_VISIBLE_DEVICES"):
        device_of(launched({}))


def test_a_rank_without_a_gpu_of_its_own_is_refused(gpus):
    gpus(0)
    assert device_of(launched(TORCHRUN)) == torch.device("cpu")
    gpus(1)
    with pytest.raises(LaunchError, match="local rank 1 has no GPU: this host shows 1"):
        device_of(launched(TORCHRUN))
    gpus(2)
    with pytest.raises(LaunchError, match="give each its LOCAL_RANK"):
        device_of(launched({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "node0"}))


def meet(port, size, rank, stores):
    launch = Launch(rank, size, rank, "127.0.0.1", port, "torchrun", has_agent=True)
    stores[rank] = meeting_store(launch, timedelta(seconds=20))


def test_ranks_that_are_started_again_do_not_see_what_the_dead_have_written():
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        stores = {}
        threads = [threading.Thread(target=meet, args=(agent.port, 3, rank, stores)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not stores[0].check(["address of rank 1"])
        stores[1].set("address of rank 1", "here")
        assert stores[0].get("address of rank 1") == stores[2].get("address of rank 1") == b"here"


def test_ranks_that_do_not_come_are_named_when_the_time_is_up():
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = Launch(0, 3, 0, "127.0.0.1", agent.port, "torchrun", has_agent=True)
    with pytest.raises(dist.DistStoreError, match="waiting for ranks 1, 2 to start"):
        meeting_store(launch, timedelta(seconds=0.1))


def test_a_rank_that_comes_to_another_run_is_refused_at_once():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    size, stores = 2, {}
    threads = [threading.Thread(target=lambda rank=rank: stores.update({rank: meeting_store(
        Launch(rank, size, rank, "127.0.0.1", port, "PMI"), timedelta(seconds=20))})) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(stores) == {0, 1}
    with pytest.raises(LaunchError, match=f"another run has met at 127.0.0.1, port {port}; set MASTER_PORT"):
        meeting_store(Launch(1, size, 1, "127.0.0.1", port, "PMI"), timedelta(seconds=20))


def test_a_rank_does_not_wait_beyond_the_timeout_for_what_is_no_store():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        launch = Launch(1, 2, 1, "127.0.0.1", server.getsockname()[1], "torchrun")
        with pytest.raises(dist.DistNetworkError, match="timed out waiting for an answer at 127.0.0.1, port"):
            meeting_store(launch, timedelta(seconds=0.3))


LAUNCHER = ["--nproc-per-node", "2"]


@pytest.mark.parametrize("meeting", [["--standalone"], []])
def test_a_launcher_that_is_alone_does_not_give_its_ranks_the_name_of_its_host(meeting, tmp_path):
    config = prepared([*LAUNCHER, "--log-dir", str(tmp_path), *meeting, "program"])[0]
    assert (config.rdzv_backend, config.rdzv_endpoint, config.local_addr) == ("c10d", "127.0.0.1:0", "127.0.0.1")


def test_a_launcher_among_others_keeps_the_address_that_it_is_given(tmp_path):
    config = prepared([*LAUNCHER, "--log-dir", str(tmp_path), "--nnodes", "2", "--master-addr", "node0",
                       "--master-port", "6000", "program"])[0]
    assert (config.rdzv_backend, config.rdzv_endpoint, config.local_addr) == ("static", "node0:6000", None)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--nnodes", "2", "--master-addr", "nosuch"], "MASTER_ADDR is 'nosuch'"),
    (["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "nosuch:6000"], "MASTER_ADDR is 'nosuch'"),
    (["--nnodes", "2", "--master-port", "70000"], "70000"), (["--nnodes", "two"], "'two'"), (["--nnodes", "0"], "> 0"),
    (["--max-restarts", "-1"], "max_restarts must be >= 0")])
def test_a_launcher_refuses_in_one_line_what_cannot_be(arguments, said):
    with pytest.raises(LaunchError) as caught:
        prepared([*LAUNCHER, *arguments, "program"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_launcher_without_a_temporary_folder_says_what_to_set(monkeypatch):
    def refuse(**_):
        raise FileNotFoundError(ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(LaunchError, match=r"no folder for its ranks' reports .*No usable .*; .* TMPDIR name a folder"):
        prepared([*LAUNCHER, "program"])


@pytest.mark.parametrize(("caught", "expected"), [("0000000000004002", True), ("0000000180000002", False)])
def test_a_rank_is_asked_to_stop_once_it_handles_sigterm(tmp_path, caught, expected):
    (tmp_path / "17").mkdir()
    (tmp_path / "17" / "status").write_text(f"Name:\tpython\nSigIgn:\t0000000001005000\nSigCgt:\t{caught}\n")
    assert listens(17, tmp_path) == expected
    assert not listens(18, tmp_path)  # it has ended


@pytest.mark.parametrize(("environment", "ends"), [({}, "interpreter"), (TORCHRUN, "exit functions, at once")])
def test_only_a_rank_among_others_ends_without_the_interpreter(monkeypatch, environment, ends):
    ended = []
    for key in TORCHRUN:
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: ended.append("exit functions"))
    monkeypatch.setattr("os._exit", lambda status: ended.append("at once"))
    monkeypatch.setattr("sys.exit", lambda status: ended.append("interpreter"))
    leave(3)
    assert ", ".join(ended).startswith(ends)


@pytest.mark.parametrize(("loaded", "num_frozen"), [(True, 0), (False, 1)])
def test_triton_finds_nothing_at_the_end_that_was_left_to_live(monkeypatch, loaded, num_frozen):
    frozen = []
    for key in TORCHRUN:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "triton", sys)
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    with pytest.raises(SystemExit):
        leave(0)
    assert len(frozen) == num_frozen


def test_what_a_program_may_not_read_at_its_start_is_one_line(capsys):
    def prepare(launch):
        raise PermissionError(13, "Permission denied", "theirs/run")

    assert status_of(prepare) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'theirs/run'\n"


@pytest.mark.parametrize(("number", "said"), [
    (ENOSPC, "my/file: cannot be written (No space left on device); make room, and run the same command again"),
    (EFBIG, "my/file: cannot be written (File too large); raise the limit on the size of files (ulimit -f), and run "
            "the same command again"),
    (EACCES, "my/file: cannot be used (Permission denied); give another path, or make this one usable")])
def test_a_file_that_the_system_refuses_is_one_line_that_says_what_to_do(capsys, number, said):
    def work(*arguments):
        raise OSError(number, os.strerror(number), "my/file")

    assert status_of(lambda launch: (ParallelConfig(), work)) == exit_status(work) == 2
    assert capsys.readouterr().err == 2 * f"error: {said}\n"
