"""metrics.jsonl is read, plotted and continued whatever power cuts, killed runs and users leave in it."""

import json

import pytest
from matplotlib.figure import Figure

from megatron.checkpoint.metrics import evaluations_of, forget_after, read_records
from megatron.data.rows.baselines import Baselines
from megatron.train.observation.picture import draw_losses

RECORDS = [{"kind": "train", "iteration": iteration, "loss": 2.5} for iteration in (1, 2, 3)]
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]
RUBBISH = [b"\x00\x00\x00}\n", b"# restarted on node7\n", b"\xff\xfe\n", b'{"kind": "train", "itera\n', b"\n", b"[]\n",
           b"3\n", b'{"iteration": 1}\n', b'{"kind": "train", "iteration": "2"}\n']


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_a_line_that_is_no_record_is_passed_over(tmp_path, rubbish):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([LINES[0], rubbish, *LINES[1:]]))
    assert read_records(path) == RECORDS
    forget_after(path, 2)
    assert read_records(path) == RECORDS[:2]
    path.read_text(encoding="utf-8")


def test_notes_stay_and_damaged_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([b"# a note\n", LINES[0], b"\x00\x00}\x01\n", LINES[2], LINES[1][:-5]]))
    forget_after(path, 2)
    assert path.read_bytes() == b"# a note\n" + LINES[0]


def test_a_record_behind_zeros_and_one_without_its_end_of_line_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\x00\x00" + LINES[0] + LINES[1].rstrip())
    forget_after(path, 5)
    with path.open("ab") as file:
        file.write(LINES[2])
    assert read_records(path) == RECORDS


def test_a_run_begins_with_an_empty_file(tmp_path):
    forget_after(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("content", [
    b"", b"\x00}\n", b"".join(LINES), b'{"kind": "train", "iteration": 1, "loss": NaN}\n',
    b'{"kind": "valid", "iteration": 1, "loss": Infinity}\n{"kind": "test", "iteration": 1}\n'])
def test_a_picture_is_drawn_of_whatever_is_there(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert draw_losses(path, Baselines(2.9, 2.7)).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(("losses", "highest"), [
    ((4.8, 2.5), 3.25), ((4.8, 4.4), 4.82), ((4.8,), 4.82), ((2.8,), 2.92)])
def test_a_picture_cuts_off_the_first_steps_but_never_a_curves_end(tmp_path, monkeypatch, losses, highest):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *rest, **more: (figures.append(figure),
                                                                          save(figure, *rest, **more)))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(RECORDS[0] | {"iteration": step, "loss": loss}) + "\n"
                            for step, loss in enumerate(losses)))
    draw_losses(path, Baselines(2.9, 2.7))
    [axes] = figures[0].axes
    assert axes.get_ylim()[1] == pytest.approx(highest)
    assert (axes.lines[0].get_marker() == "o") == (len(losses) == 1)  # one point makes no line


def test_an_evaluation_compares_with_those_of_the_same_data_as_the_last_of_its_kind():
    a, b, none = ({"kind": "valid", "measured_on": data} for data in ("a", "b", None))
    old, test = {"kind": "valid"}, {"kind": "test", "measured_on": "c"}
    assert evaluations_of([a, b, a, test], "valid") == ([a, a], 1)
    assert evaluations_of([a, b, test], "valid") == ([b], 1)
    assert evaluations_of([old, none, old], "valid") == ([old, none, old], 0)
    assert evaluations_of([old, a], "valid") == ([a], 1)
    assert evaluations_of([a], "test") == ([], 0)
