#!/usr/bin/env python
"""The same as `lm-eval-kvpress verify`: are compressed caches scored correctly?"""

import sys

from lm_eval_kvpress.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
