"""Fast-Slow Training of language models."""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and not find_spec("pydantic"):  # python -m fst_fast.train after a bare pip install
    print("error: the kernels are installed without what the trainer needs; pip install -e '.[train]'", file=sys.stderr)
    sys.exit(2)
