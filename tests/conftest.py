"""What all tests share: a folder for what toy environments leave behind, reproducible choices of hypothesis."""

import atexit
import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings

# The processes of environments inherit it from the server that they are forked from, which starts only once.
os.environ["TOY_FOLDER"] = tempfile.mkdtemp(prefix="toys-")
atexit.register(shutil.rmtree, os.environ["TOY_FOLDER"], ignore_errors=True)

settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("reproducible")
