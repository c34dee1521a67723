"""A campaign of faults: what a kill, a damaged file, a full disk and bad input do to a run."""
