"""`python -m megatron.parallel.launch`: starts ranks as `torchrun` does, with the same arguments (see `agent`)."""

import os
import sys

from megatron.parallel.launch.stop_signals import StopSignals

if __name__ == "__main__":
    signals = StopSignals()
    signals.listen()
    # Or torch, here and in the ranks, would warn at each connection of hosts whose addresses have no names, and print
    # C++ frames when a peer has gone. It reads this when it is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from megatron.parallel.launch.agent import main  # loads torch, during which a stop signal may come
    sys.exit(main(sys.argv[1:], signals))
