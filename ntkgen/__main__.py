"""`python -m ntkgen`."""

from ntkgen.cli import main

main()
