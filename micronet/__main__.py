"""`python -m micronet`."""

from micronet.cli import main

main()
