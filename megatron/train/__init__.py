"""The training program: build, loop, step, evaluate, events, meters."""
