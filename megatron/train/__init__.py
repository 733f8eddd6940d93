"""A training run from its start to its end: the loop over steps, evaluations, saving, stopping, going back."""
