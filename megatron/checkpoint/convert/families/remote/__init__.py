"""The code of ProteinForMaskedLM, for folders of transformers whose model none of its classes can compute.

`configuration_protein` has its flags, `modeling_protein` the model. Both are copied into the folder, for
trust_remote_code=True; they import only transformers and PyTorch.
"""
