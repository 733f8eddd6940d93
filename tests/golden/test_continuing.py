"""examples/continue_esm2.sh on a small published model: what one command gives, and resuming."""

import gzip
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from megatron.checkpoint.convert.families import hf
from megatron.config import ModelConfig
from megatron.data.corpus.vocab import Vocab
from pretrain_tape import main
from tests.golden.training import ROOT, losses
from tests.transformers_models import difference, our_logits, their_logits, trained_here, transformers

MODEL = ModelConfig(num_layers=2, hidden_size=24, num_attention_heads=3, ffn_hidden_size=96, kv_channels=8,
                    num_query_groups=3, position_embedding_type="rope", token_dropout=True, bias_gelu_fusion=False,
                    layernorm_epsilon=1e-5, max_position_embeddings=256, contact_head=True)
FLAGS = ["--seq-length", "256", "--lr", "1e-3", "--num-workers", "0", "--peak-tflops", "1", "--log-interval", "1",
         "--micro-batch-size", "4", "--eval-interval", "100", "--save-interval", "100"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a published model, 60 proteins and 60 others."""
    folder = tmp_path_factory.mktemp("inputs")
    hf.write(trained_here(MODEL, "esm", "both"), folder / "esm2_tiny")
    with gzip.open(ROOT / "examples" / "proteins" / "small.fasta.gz", "rt") as file:
        records = file.read().split(">", 121)[1:-1]
    for name, part in (("new", records[:60]), ("old", records[60:])):
        with gzip.open(folder / f"{name}.fasta.gz", "wt") as file:
            file.writelines(f">{record}" for record in part)
    return folder


def start(python, inputs, out, *flags, model="esm2_tiny"):
    """Starts the script; output and errors in one pipe."""
    command = ["bash", "examples/continue_esm2.sh", inputs / model, inputs / "new.fasta.gz", out, *FLAGS,
               *flags]
    given = {"PYTHON": python, "OMP_NUM_THREADS": "1", "EPOCHS": "1", "OLD_PROTEINS": inputs / "old.fasta.gz"}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=os.environ | given, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def unbroken(python, inputs, tmp_path_factory):
    """The folder of a run that nothing disturbed, and what was said."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    process = start(python, inputs, out)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return out, said


def test_one_command_says_where_everything_is_and_what_was_gained_on_either_corpus(unbroken):
    out, said = unbroken
    for corpus in ("new_text_document", "old_text_document"):
        curve = losses(out / "run", f"valid/{corpus}")
        before, after = curve[0], curve[max(curve)]
        assert after < before
        line = next(line for line in said.splitlines() if line.startswith(f"  validation loss on {corpus}"))
        assert f"{after:.4f} nats" in line and line.endswith(f"before the first step {before:.4f}")
    assert f'from_pretrained("{out}/model")' in said
    card = (out / "model" / "README.md").read_text()
    assert 'base_model: "esm2_tiny"' in card and "- validation loss on old_text_document " in card


@pytest.mark.table
def test_the_call_that_is_shown_takes_the_models_own_code_where_it_has_some(python, inputs, unbroken, tmp_path):
    assert "/model\")\n" in unbroken[1]
    hf.write(trained_here(replace(MODEL, swiglu=True), "esm", "both"), inputs / "own")
    process = start(python, inputs, tmp_path / "out", "--train-iters", "2", model="own")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert f'from_pretrained("{tmp_path}/out/model", trust_remote_code=True)\n' in said


def test_transformers_loads_what_comes_out_and_computes_what_our_program_does(unbroken, inputs):
    vocab, after = Vocab.from_file("esm"), unbroken[0] / "model"
    model = transformers().AutoModelForMaskedLM.from_pretrained(after, local_files_only=True).eval()
    logits = their_logits(model, vocab)
    assert all(torch.isfinite(part).all() for part in logits)
    ours = our_logits(hf.read(after), vocab)
    assert difference(logits, ours) < 2e-5
    assert difference(ours, our_logits(hf.read(inputs / "esm2_tiny"), vocab)) > 0.1  # it has learnt something


def test_what_comes_out_is_gone_on_from_again(unbroken, tmp_path):
    out, _ = unbroken
    assert main(["--load", str(out / "model"), "--finetune", "--save", str(tmp_path), "--data-path",
                 str(out / "data" / "new_text_document"), "--split", "90,10", *FLAGS, "--train-iters", "1",
                 "--eval-at-start", "--eval-iters", "0"]) == 0
    curve = losses(out / "run", "valid/new_text_document")
    assert losses(tmp_path, "valid")[0] == pytest.approx(curve[max(curve)], rel=1e-6)


@pytest.mark.table
def test_a_run_that_was_asked_to_stop_saves_and_the_same_command_goes_on_to_the_same_end(unbroken, python, inputs,
                                                                                                   tmp_path):
    process = start(python, inputs, tmp_path / "out")
    metrics = tmp_path / "out" / "run" / "metrics.jsonl"
    while not (metrics.exists() and b'"train"' in metrics.read_bytes()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 0 and "stopped at iteration" in said, said
    assert not (tmp_path / "out" / "model").exists()
    again = start(python, inputs, tmp_path / "out")
    said = again.communicate()[0]
    assert again.returncode == 0 and "going on from iteration" in said, said
    assert losses(tmp_path / "out" / "run") == losses(unbroken[0] / "run")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (unbroken[0] / "model" / name).read_bytes()
    assert 'base_model: "esm2_tiny"' in (tmp_path / "out" / "model" / "README.md").read_text()


@pytest.mark.table
def test_a_run_that_stops_of_itself_before_its_end_is_not_written_out(python, inputs, tmp_path):
    process = start(python, inputs, tmp_path / "out", "--exit-interval", "1")
    said = process.communicate()[0]
    assert process.returncode == 0 and "the run has not come to its end: the same command goes on with it" in said, said
    assert not (tmp_path / "out" / "model").exists()
