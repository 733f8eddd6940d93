"""What a layout costs before anyone pays for it: formulas for a rank's memory, messages and time; no tensors."""
