"""How a tool ends: each mistake of a user in one line, and without tracebacks when stopped."""

import sys
from collections.abc import Callable

from runtime.errors import UserError


def run(name: str, body: Callable[[], int]) -> int:
    """The exit status of a tool: its body's, 1 after an error of files or the user's, 130 after
    Ctrl-C."""
    try:
        return body()
    except (UserError, OSError) as error:
        sys.stderr.write(f"{name}: error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped\n")
        return 130
