"""Fine-tuning: teaches a pretrained model a task.

`run` is the whole, by the `flags`: it chooses a learning rate if asked to (`calibration`), and trains with each seed
(`training`), saving as it goes (`progress`). `model` is a pretrained model with a task head, one of `heads`.

Rooms: `data/` (labelled proteins), `predictions/` (what a taught model says of proteins, and how good that is).
"""
