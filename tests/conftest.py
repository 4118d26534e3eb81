import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

with suppress(ImportError):  # the environment of vLLM has none
    from hypothesis import settings

    settings.register_profile("any speed", deadline=None)  # of a busy machine, too
    settings.load_profile("any speed")
torch.set_num_threads(1)  # the models are tiny, and the machine's other core has work of its own
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts pytest in the background has it ignored


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    """`cli.run` of a test is not to be asked when pytest is stopped."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def few_instructions() -> Iterator[None]:
    """For runs whose evaluations are compared with each other, or with nothing: a fifth of their seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fst_fast.evaluate.INSTRUCTIONS", 4)
        yield
