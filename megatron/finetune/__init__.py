"""Fine-tuning: teaches a pretrained model a task. Flags, heads, the model with its head, training, the runs of all
seeds.
"""
