"""The surroundings of every test: no network, no display, few threads, the same hypothesis examples each time."""

import os

_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ.update(
    HF_HUB_OFFLINE="1",  # tests of the Hub's client talk to a local server, and lift this for themselves
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, _THREADS)  # read when torch and NumPy are imported

from hypothesis import settings  # noqa: E402

settings.register_profile("workbench", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("workbench")
