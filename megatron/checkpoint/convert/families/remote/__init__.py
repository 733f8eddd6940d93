"""The code of ProteinForMaskedLM, for folders of transformers whose model none of its classes can compute.

`configuration_protein` has its flags, `modeling_protein` the model and `attention_protein` its attention. All three are
copied into the folder, for trust_remote_code=True; they import only transformers and PyTorch.
"""
