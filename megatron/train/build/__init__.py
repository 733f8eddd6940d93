"""From flags to a run that is ready to train: data, model and optimizer built, and what a checkpoint brings back."""
