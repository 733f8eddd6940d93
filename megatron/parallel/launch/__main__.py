"""`python -m megatron.parallel.launch`: starts ranks as `torchrun` does, with the same arguments (see `agent`)."""

import sys

from megatron.parallel.launch.stop_signals import StopSignals

if __name__ == "__main__":
    signals = StopSignals()
    signals.listen()
    from megatron.parallel.launch.agent import main  # loads torch, during which a stop signal may come
    sys.exit(main(sys.argv[1:], signals))
