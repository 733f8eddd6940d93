"""The model in its layout, and one step of it: forward, backward, update; evaluation; sums kept on the device."""
