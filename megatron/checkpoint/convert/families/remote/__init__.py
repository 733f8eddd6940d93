"""The code of ProteinForMaskedLM, for folders of transformers whose model none of its classes can compute.

The two modules are copied into the folder, for trust_remote_code=True; they import only transformers and PyTorch.
"""
