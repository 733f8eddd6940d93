"""Starts ranks as `python -m torch.distributed.run` does, with the same arguments, but ends as the failed rank ended.

The rank has said what was wrong; the launcher's own traceback of forty lines would bury it.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
