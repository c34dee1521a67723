"""`python -m lm_eval_kvpress`: the same as the script `lm-eval-kvpress`."""

import sys

from lm_eval_kvpress.cli import main

sys.exit(main())
