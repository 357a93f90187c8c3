"""`python -m ds_serve` is the command `ds-serve`."""

from ds_serve.cli import main

main()
