"""`mlx-hla`, and `python -m mlx_hla`."""

import signal
import sys


def main() -> int:
    # While the imports run, Ctrl-C just ends the program: it would be a traceback from somewhere in them.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mlx_hla.cli import main as run
    from mlx_hla.process import warn_in_a_line

    try:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        warn_in_a_line()
        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
