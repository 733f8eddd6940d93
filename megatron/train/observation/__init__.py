"""What a user sees of a run. `events` writes log lines, metrics.jsonl, TensorBoard (`board`) and loss.png (`picture`).

`observers` also pass each record to wandb, trackio or mlflow (`trackers`) and `prometheus`. `pace` estimates the time
left, `memory` reads the peak memory, `profiler` records a trace.
"""
