"""``python cli.py``: the same as the ``toss`` command."""

import sys

from toss_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
