"""The process of the verifier regex, a script: JSON lines of [seconds, pattern, text] in, of whether it is found out.

A search cannot be interrupted, and (a+)+$ takes longer than the universe has: here a signal ends the process.
"""

from __future__ import annotations

import json
import re
import signal
import sys

print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    seconds, pattern, text = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
    print(json.dumps(re.search(pattern, text) is not None), flush=True)
