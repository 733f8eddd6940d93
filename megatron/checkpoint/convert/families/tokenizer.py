"""What AutoTokenizer needs to give our ids: one a residue, spaced or not, in either case.

White space and the gaps `-` and `.` are dropped, and `*` at the end; each other letter that has no token is the unknown
one. (transformers' own tokenizers of the families do so for capitals alone: EsmTokenizer takes a run of other letters
for one unknown token, BertTokenizer wants blanks between residues.)
"""

from typing import Any

from megatron.data.corpus.vocab import RESIDUE_LETTERS, Vocab

_GAPS, _STOP = r"[\s.\-]+", r"\*+$"


def tokenizer_files(vocab: Vocab, ends: str, longest: int | None) -> dict[str, Any]:
    """The content of each file, which is JSON, by its name.

    `ends`: as --protein-ends has it. `longest`: the most tokens that the model takes, None where there is no such.
    """
    ids = {"cls": vocab.cls_id, "sep": vocab.sep_id, "pad": vocab.pad_id, "mask": vocab.mask_id, "unk": vocab.unk_id}
    special = {("eos" if role == "sep" and "eos" in vocab.tokens[index] else role) + "_token": vocab.tokens[index]
               for role, index in ids.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_input_names": ["input_ids", "attention_mask"], **special}
    if longest is not None:
        config["model_max_length"] = longest
    return {"tokenizer.json": _tokenizer(vocab, ends, sorted(ids.values())), "tokenizer_config.json": config,
            "special_tokens_map.json": special}


def _tokenizer(vocab: Vocab, ends: str, special: list[int]) -> dict[str, Any]:
    """What the library `tokenizers` reads."""
    around = {index: vocab.tokens[index] for index in (vocab.cls_id, vocab.sep_id)}
    last = [{"SpecialToken": {"id": vocab.tokens[vocab.sep_id], "type_id": 0}}] if ends == "both" else []
    one = [{"SpecialToken": {"id": vocab.tokens[vocab.cls_id], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
           *last]
    replaced = {_GAPS: "", _STOP: "", **{letter.lower(): letter for letter in RESIDUE_LETTERS}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": vocab.tokens[index], "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True} for index in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
            for pattern, content in replaced.items()]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": one, "pair": [*one, {"Sequence": {"id": "B", "type_id": 0}}, *last],
            "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}
                               for index, token in around.items()}},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab.ids, "unk_token": vocab.tokens[vocab.unk_id]}}
