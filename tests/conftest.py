"""Before any test imports torch: threads that wait must not spin, since the tests share their cores; and no hub."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
