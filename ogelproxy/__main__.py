"""Run the command line: ``python -m ogelproxy``."""

from ogelproxy.cli import main

main()
