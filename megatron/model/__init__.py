"""The masked language model, on packed proteins as one flat line of tokens.

`protein_model` is the whole, or one pipeline stage: `embedding`, `transformer` (blocks of `attention` and
`feed_forward`; `normalisation`), and `head`. `initialisation` gives initial weights, `lora` adds adapters, `flops`
counts arithmetic; `contacts` and `states` read attention maps and hidden states.
"""
