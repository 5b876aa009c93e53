"""Peak extra memory of a call in this process.

After a call on a tiny input, which loads the libraries and starts the threads, it is the highest resident set
during the call minus the resident set just before it. So it counts everything that the call makes resident,
gradient and BLAS buffers included, and leaves out the inputs. Linux resets and reports that mark (VmHWM);
elsewhere the growth of ru_maxrss stands in, which can only come out too small.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Call = Callable[[], object]


def peak_of_call(call: Call, warm_up: Call) -> int:
    """Bytes by which the resident set of this process grows at most while `call` runs."""
    warm_up()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: hand free heap pages back, or their reuse would not be seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    except OSError:
        before = _max_rss()
        call()
        return _max_rss() - before
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def _max_rss() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
