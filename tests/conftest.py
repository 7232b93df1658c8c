"""Shared by all tests."""

import os

# Before torch is imported: its OpenMP threads must not spin while they wait, or two test runs on one machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
