"""The surroundings of every test: no network, no display, few threads, the same hypothesis examples each time."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",  # tests of the Hub's client talk to a local server, and lift this for themselves
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # a second thread spins on models this small: ten times slower on a busy machine

from hypothesis import settings  # noqa: E402

settings.register_profile("workbench", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("workbench")
