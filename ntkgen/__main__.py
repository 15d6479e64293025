"""The command `ntkgen`, and `python -m ntkgen`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C is one line, also while the command line is still imported."""
    try:
        from ntkgen.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)  # as a shell reports it
    run()


if __name__ == "__main__":
    main()
