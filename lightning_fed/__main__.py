"""``python -m lightning_fed`` is the console script ``lightning-fed``."""

from lightning_fed.cli import main

if __name__ == "__main__":
    main()
