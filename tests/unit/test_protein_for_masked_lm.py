"""What transformers' own tools do with a model works for ProteinForMaskedLM, or is refused in a sentence."""

import warnings

import pytest
import torch

from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from tests.families import PROTEINLM, RECIPE
from tests.transformers_models import PROTEINS, ids_of, padded, trained_here, transformers

CONFIGS = {"tied": PROTEINLM, "untied": RECIPE}


@pytest.fixture(params=CONFIGS)
def checkpoint(request):
    return trained_here(CONFIGS[request.param], "iupac", "start")


def loaded(checkpoint, folder, **named):
    from megatron.checkpoint.convert.families.remote.modeling_protein import ProteinForMaskedLM

    return ProteinForMaskedLM.from_pretrained(hf.write(checkpoint, folder), **named).eval()


def batch_of(checkpoint):
    """The ids and the attention mask of the test's proteins."""
    vocab = vocabulary_of(checkpoint)
    ids, mask = padded([ids_of(protein, vocab) for protein in PROTEINS], vocab)
    return {"input_ids": ids, "attention_mask": mask}


def test_the_output_layer_is_the_one_with_the_output_matrix(checkpoint, tmp_path):
    model, batch = loaded(checkpoint, tmp_path / "out"), batch_of(checkpoint)
    is_tied = not checkpoint.state["config"]["untie_embeddings_and_output_weights"]
    assert (model.get_output_embeddings() is model.get_input_embeddings()) is is_tied
    model.get_output_embeddings().weight.data.zero_()
    logits = model(**batch).logits
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))  # the bias is left


def test_added_tokens_change_no_logit_of_the_others_and_come_back(checkpoint, tmp_path):
    model, batch = loaded(checkpoint, tmp_path / "out"), batch_of(checkpoint)
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    before, size = model(**batch).logits, len(tokenizer)
    tokenizer.add_tokens(["<a>", "<b>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert torch.equal(model(**batch).logits[..., :size], before)
    assert model(input_ids=torch.tensor([[size + 1]])).logits.shape[-1] == size + 2
    model.save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    assert vocabulary_of(hf.read(tmp_path / "more")).tokens[size:] == ("<a>", "<b>")
    model.resize_token_embeddings(size)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(is_reentrant, checkpoint, tmp_path):
    model, batch = loaded(checkpoint, tmp_path / "out"), batch_of(checkpoint)
    model.config.attention_dropout = model.config.hidden_dropout = 0.0
    found = []
    for is_recomputed in (False, True):
        if is_recomputed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a name of transformers that it will drop
                model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
            calls = count_calls(model.transformer.layers[0])
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(calls) == 2
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def count_calls(module):
    """A list that grows by one with each forward of `module`."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_what_it_does_not_support_is_refused_where_it_is_asked_for(checkpoint, tmp_path):
    model, batch = loaded(checkpoint, tmp_path / "out", attn_implementation="eager"), batch_of(checkpoint)
    for name, value in (("output_attentions", True), ("position_ids", batch["input_ids"])):
        with pytest.raises(ValueError, match=f"does not support {name}; leave it out"):
            model(**batch, **{name: value})
    assert model(**batch, output_attentions=False, position_ids=None).attentions is None
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="does not support output_attentions"):
        model(**batch)


def test_the_configuration_and_the_caller_choose_what_is_given_back(checkpoint, tmp_path):
    model, batch = loaded(checkpoint, tmp_path / "out"), batch_of(checkpoint)
    loss, logits = model(**batch, labels=batch["input_ids"], return_dict=False)
    assert (loss.ndim, logits.ndim) == (0, 3)
    assert model(**batch).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == model.config.num_layers + 1


def test_the_gradient_of_accumulated_batches_is_their_mean_in_transformers_trainer(checkpoint, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    batch, moved = batch_of(checkpoint), []
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": ids}
            for ids, mask in zip(batch["input_ids"][:2], batch["attention_mask"][:2], strict=True)]
    for num_accumulated, items in ((1, [rows[0]]), (2, [rows[0], rows[0]])):
        model = loaded(checkpoint, tmp_path / f"out-{num_accumulated}")
        model.config.attention_dropout = model.config.hidden_dropout = 0.0
        before = model.lm_head.bias.detach().clone()
        arguments = transformers().TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=num_accumulated,
            max_steps=1, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
        transformers().Trainer(model, arguments, train_dataset=items).train()
        moved.append(model.lm_head.bias.detach() - before)
    torch.testing.assert_close(moved[1], moved[0])
