"""What a user sees of a run: log lines, TensorBoard, metrics.jsonl, picture, profile; trackers and Prometheus."""
