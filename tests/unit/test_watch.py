"""tools/watch.py shows a run from its folder alone, in whatever state that is; curves are drawn as text."""

import json
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from megatron.checkpoint.claim import Claim
from megatron.study.text_plot import MARK, text_plot
from megatron.study.watching import frame, look
from tools.watch import main

ROOT = Path(__file__).resolve().parents[2]
NOW_S = 1e9
CONFIG = "[training]\ntrain-iters = 1000\n"


def record(step, kind="train", **values):
    known = {"loss": 2.5 + 2 * math.exp(-step / 50), "perplexity": 12.0, "masked_accuracy": 0.25,
             "num_iterations": 1000, "num_ranks": 2,
             "memory_gib": 0.75, "time_left_s": 90.0, "residues_per_s": 12345.0, "model_tflops": 0.5,
             "share_of_peak": 0.4, "learning_rate": 3e-4, "written_s": NOW_S - (640 - step)}
    return {"kind": kind, "iteration": step} | (known if kind == "train" else {"loss": known["loss"]}) | values


@pytest.fixture
def run(tmp_path):
    """A run that stopped at step 640 of 1000, its last record half written, 10 seconds ago."""
    folder = tmp_path / "my-run"
    (folder / "spikes").mkdir(parents=True)
    (folder / "spikes" / "step_0000415.tsv").touch()
    records = [record(step) for step in range(10, 641, 10)]
    records[20]["skipped_iterations"] = 3
    records += [record(100, "valid", loss=3.0), record(600, "valid", loss=3.5)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records) + '{"kind": "train", "it')
    os.utime(folder / "metrics.jsonl", (NOW_S - 10, NOW_S - 10))
    for step in (500, 600):
        (folder / f"iter_0000{step}").mkdir()
        state = folder / f"iter_0000{step}" / "state.json"
        state.write_text("{}")
        os.utime(state, (NOW_S - 640 + step, NOW_S - 640 + step))
    (folder / "iter_0000500" / "validation.json").write_text('{"loss": 2.75}')
    (folder / "best").symlink_to("iter_0000500")
    return folder


def shown(folder, width=80, height=24, now_s=NOW_S):
    lines = frame(look(folder, now_s), width, height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    return "\n".join(lines)


@pytest.mark.parametrize(("width", "height"), [(80, 23), (120, 39), (40, 12), (20, 3)])
def test_a_view_fills_the_terminal_and_no_more(run, width, height):
    text = shown(run, width, height)
    assert text.startswith("my-run: stopped") and len(text.split("\n")) == height or height == 12


def test_a_view_tells_what_the_folder_knows(run):
    text = shown(run)
    for said in ("step 640 of 1,000 [", "64 %", "loss        2.5000, 12.00 perplexity, 25.0% predicted right",
                 "3.5000 at step 600, best 3.0000 at 100", "12.3k residues/s, 0.500 TFLOP/s, 40% of peak",
                 "0.75 GiB on the fullest rank, 2 ranks", "3.000E-04", "iter_0000600, 40 s old, best iter_0000500 (2.7",
                 "wrong steps 1, last 415, 3 skipped", "last record 10 s ago", f"{MARK} on validation"):
        assert said in text, said
    assert " left" not in text


def test_a_run_that_diverged_says_so(run):
    lost = [record(step, kind, loss=None, perplexity=None) for step, kind in ((630, "train"), (630, "valid"))]
    records = [record(600, "valid", loss=3.0), *lost]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    text = shown(run)
    assert "loss        not finite, 25.0% predicted right" in text
    assert "validation  not finite at step 630, best 3.0000 at 600" in text


def test_validations_on_other_data_are_counted_and_neither_drawn_nor_compared(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(f"\n{json.dumps(record(step, 'valid', loss=4.0 - step / 1e4, measured_on='x'))}"
                           for step in (610, 620)))
    assert "validation  3.9380 at step 620, the best; 2 before on other data" in shown(run)


def test_a_run_is_running_silent_dead_or_done(run):
    claim = Claim(run)
    claim.acquire(pytest.fail)
    text = shown(run)
    assert text.startswith("my-run: running\n") and "64 %, 1 min left\n" in text  # 90 s, 10 s ago
    silent = shown(run, now_s=NOW_S + 290)
    assert re.match(r"my-run: silent since \d\d:\d\d \(5 min\)\n", silent) and " left" not in silent.split("\n")[1]
    lock = run / ".lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "started": "1", "token": "of another"}))
    assert shown(run).startswith("my-run: died")
    claim.release()
    lock.unlink()
    assert shown(run).startswith("my-run: stopped\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(record(1000, time_left_s=0.0))}\n")
    assert shown(run).startswith("my-run: finished\n")


def test_a_run_without_a_record_yet_shows_its_end_from_its_configuration(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    claim = Claim(tmp_path)
    claim.acquire(pytest.fail)
    first, second, *_ = shown(tmp_path).split("\n")
    claim.release()
    assert first.endswith(": starting") and second.startswith("step 0 of 1,000 [---")


def test_a_run_stopped_between_log_lines_is_shown_at_its_checkpoint(run):
    (run / "iter_0000645").mkdir()
    assert "step 645 of 1,000 [" in shown(run)
    (run / "metrics.jsonl").unlink()
    (run / "config.toml").write_text(CONFIG)
    assert "step 645 of 1,000 [" in shown(run)


def test_records_of_whatever_edition_are_shown_as_far_as_they_go(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "iteration": 5, "loss": null}\n'
                                            '{"kind": "valid", "iteration": 5}\n\0\0}\n')
    assert "step 5" in shown(tmp_path)


def test_what_is_no_run_is_one_line_and_status_2(tmp_path, run, capsys):
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "empty", "holds no run"), (tmp_path / "nothing", "is not there"),
                         (run / "metrics.jsonl", "is no folder"), (tmp_path, f"such as {run}")):
        assert main([str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(rf"error: [^\n]*{re.escape(said)}[^\n]*\n", err)


def test_where_nobody_watches_a_view_is_printed_once_without_what_terminals_understand(run, capsys):
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("my-run: stopped\n") and "\x1b" not in out


def test_on_a_terminal_the_view_stays_until_ctrl_c_and_leaves_the_screen_as_it_was(run):
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "tools/watch.py", str(run), "--every", "0.01"], cwd=ROOT, stdin=theirs,
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = ""
    while seen.count("my-run: stopped") < 2:
        assert select.select([ours], [], [], 60)[0], seen
        seen += os.read(ours, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    while select.select([ours], [], [], 60)[0]:
        try:
            seen += os.read(ours, 4096).decode(errors="replace")
        except OSError:  # Linux says so of a terminal whose programs have ended
            break
    os.close(ours)
    assert process.wait() == 0
    assert seen.startswith("\x1b[?1049h") and seen.rstrip().endswith("\x1b[?1049l") and "Traceback" not in seen


# --- the curve ---


def dots(lines):
    """Where the dots of a Braille picture are, (column, row) from the top left of what is right of the bar."""
    rows = [line.partition("|")[2] for line in lines[:-1]]
    bits = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (0, 3), 7: (1, 3)}  # Unicode's order
    return {(2 * column + bits[bit][0], 4 * row + bits[bit][1]) for row, line in enumerate(rows)
            for column, letter in enumerate(line) if letter != " "
            for bit in bits if ord(letter) - 0x2800 >> bit & 1}


def test_a_straight_line_is_drawn_straight_from_corner_to_corner():
    lines = text_plot([(step, 10 - step / 10) for step in range(101)], [], width=32, height=6)
    found = dots(lines)
    assert (39, 19) in found and len(lines) == 6 and lines[-1].split() == ["0", "100"]
    # The first twentieth lies above the picture: there are no labels of what is not drawn.
    assert lines[0].split()[0] == "9.5" and lines[4].split()[0] == "0"
    assert all(abs(row - (column * 10 / 39 - 0.5) * 2) <= 1.5 for column, row in found)


def test_a_curve_has_no_gaps_between_its_points_and_marks_where_they_belong():
    found = dots(text_plot([(0, 1.0), (50, 0.0), (100, 1.0)], [], width=42, height=8))
    assert {column for column, _ in found} == set(range(60))
    lines = text_plot([], [(0, 1.0), (100, 0.0)], width=30, height=5)
    assert lines[0].endswith("|" + MARK) and lines[3].endswith(MARK)


def test_neighbours_in_a_column_are_drawn_as_their_mean():
    up_and_down = [(step, 1.0 + step % 2) for step in range(10_000)]
    found = dots(text_plot(up_and_down, [], width=32, height=9))
    assert {row for _, row in found} <= {15, 16} and len({column for column, _ in found}) == 40


@pytest.mark.parametrize("points", [[(1, 2.5)], [(1, 2.5), (2, 2.5)], [(1, 0.0), (2, 0.0)], [(0, 1e9), (1, -1e9)]])
def test_whatever_there_is_is_drawn_within_its_lines(points):
    for is_plain in (False, True):
        lines = text_plot(points, points, width=30, height=6, is_plain=is_plain)
        assert len(lines) == 6 and max(map(len, lines)) <= 30 and MARK in "".join(lines)
    assert text_plot([], [], 30, 6) == text_plot(points, [], 12, 6) == text_plot(points, [], 30, 2) == []
