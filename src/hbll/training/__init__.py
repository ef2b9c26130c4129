"""Training runs: the loop, their folders, their evaluation, comparison and report."""
