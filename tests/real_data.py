"""Where tests on real text look for it: WikiText-2 and PG-19, laid out as tasks/kvpress_ppl/README.md says.

They are skipped, with a reason, where there is none.
"""

from __future__ import annotations

import os
from pathlib import Path

from repository import ROOT

DATA = Path(os.environ.get("KVPRESS_DATA_DIR") or ROOT.parent / "shared" / "data")
