"""What turns gradients into new weights: optimizer, schedule, loss scale, clipping; and their average."""
