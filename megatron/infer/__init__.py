"""Inference with trained models: loading a checkpoint of any format, and feeding it proteins.

A program begins with `door`, the flags that all share. `pretrained` loads the model, for it and for
`load_pretrained()`; `proteins` reads files, and `skipped` counts the records left out. `windows` cuts proteins that are
too long, `rows` packs them. `answers` computes hidden states, contacts and logits, `predictions` the probabilities of
residues, masked or not. `bootstrap` and `spearman` (rank correlation) say how sure a measure is.

Rooms, one for a kind of question: `embed/`, `evaluation/` (masked residues), `variants/`, `contacts/`.
"""
