"""What a folder of transformers gets where its model is none of theirs: the model itself, for trust_remote_code=True.

The two files are copied as they are; they know transformers and PyTorch alone.
"""
