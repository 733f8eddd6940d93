"""The files that make transformers' AutoTokenizer give our token ids: one token for each residue.

Residues may be separated by spaces or not, in upper or lower case. White space, the gap characters `-` and `.`, and `*`
at the end are dropped; any other character without a token becomes the unknown token. A token of several characters is
taken where its name stands. (The tokenizers that transformers has for these families need capitals: EsmTokenizer makes
one unknown token of a run of other letters, and BertTokenizer also needs spaces between residues.)
"""

from typing import Any

from megatron.data.corpus.vocab import RESIDUE_LETTERS, Vocab

_GAPS, _STOP = r"[\s.\-]+", r"\*+$"


def tokenizer_files(vocab: Vocab, ends: str, longest: int | None) -> dict[str, Any]:
    """The content of each JSON file, by its name.

    `ends`: the value of --protein-ends; `longest`: the maximal number of tokens of a protein, None for no limit.
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
    """The content of tokenizer.json, for the library `tokenizers`; `special`: the ids of the special tokens."""
    named = [index for index, token in enumerate(vocab.tokens) if index in special or len(token) > 1]
    around = {index: vocab.tokens[index] for index in (vocab.cls_id, vocab.sep_id)}
    last = [{"SpecialToken": {"id": vocab.tokens[vocab.sep_id], "type_id": 0}}] if ends == "both" else []
    one = [{"SpecialToken": {"id": vocab.tokens[vocab.cls_id], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
           *last]
    replaced = {_GAPS: "", _STOP: "", **{letter.lower(): letter for letter in RESIDUE_LETTERS}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": vocab.tokens[index], "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": index in special} for index in named],
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
