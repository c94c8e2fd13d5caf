"""Entry point of `python -m nnunet_dycon.cli`, which is the same as the command nnunet_dycon."""

import sys

from nnunet_dycon.cli import main

sys.exit(main())
