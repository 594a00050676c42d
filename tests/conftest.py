"""Settings for every test."""

import os

# Tests run side by side: threads of their own would only wait for each other. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None)
settings.load_profile("quick")
