"""Elastic training, in which the number of machines may change: several launchers of one rank each on this machine."""

import os
import subprocess
import time

import pytest

from tests.golden.training import ROOT, TINY, free_port, processes_with

RUN = [*TINY, "--num-layers", "1", "--micro-batch-size", "1", "--global-batch-size", "2", "--eval-interval", "1000000",
       "--train-iters", "1000000", "--save-interval", "10", "--log-interval", "2"]
PATIENCE_S = 240


@pytest.mark.table
def test_a_machine_that_comes_later_joins_and_when_it_is_lost_the_other_goes_on(corpus, tmp_path, python):
    folder, port = tmp_path / "run", free_port()

    def start(name):
        command = [python, "-m", "megatron.parallel.launch", "--nnodes", "1:2", "--rdzv_backend", "c10d",
                   "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "run", "--rdzv_conf", "last_call_timeout=1",
                   "--max_restarts", "1", "--nproc_per_node", "1", str(ROOT / "pretrain_tape.py"), *RUN, "--data-path",
                   corpus, "--save", str(folder), "--load", str(folder)]
        with (tmp_path / name).open("w") as output:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output,
                                    stderr=subprocess.STDOUT)

    def wait_for_steps(num_ranks, num_beginnings):
        """Until the first launcher's ranks have begun so often, and the last time so many have taken steps."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            beginnings = (tmp_path / "first").read_text().split("letter-frequency baseline")
            if len(beginnings) > num_beginnings and " iteration " in beginnings[-1] and processes_with(
                    str(folder), f"WORLD_SIZE={num_ranks}"):
                return
            assert first.poll() is None and time.monotonic() < deadline_s, beginnings
            time.sleep(0.1)

    first = start("first")
    second = None
    try:
        wait_for_steps(1, 1)
        second = start("second")
        wait_for_steps(2, 2)
        second.kill()
        for rank in processes_with(str(folder), "RANK=1"):
            os.kill(rank, 9)
        wait_for_steps(1, 3)
    finally:
        for launcher in filter(None, (first, second)):
            launcher.terminate()
            launcher.wait(PATIENCE_S)
    output = (tmp_path / "first").read_text()
    assert first.returncode == 0, output
    assert output.count("going on from iteration") == 2
    assert "starting again, restart 1 of 1" in output
