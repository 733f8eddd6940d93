"""What a layout costs before anyone pays for it: a rank's memory, messages and time, measured on fake tensors."""
