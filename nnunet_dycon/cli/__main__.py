"""`python -m nnunet_dycon.cli`: the command nnunet_dycon."""

import sys

from nnunet_dycon.cli import main

sys.exit(main())
