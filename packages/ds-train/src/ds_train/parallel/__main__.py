"""`python -m ds_train.parallel FILE`: one rank, as `launch` starts it."""

import signal
import sys

from ds_train.parallel.worker import leave, main

if __name__ == "__main__":
    # A terminal's interrupt reaches all processes of it: the launcher tells the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave(main(sys.argv[1]))
