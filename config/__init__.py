"""Every flag, once: flags.py defines them, command_line.py parses them, smoke.py shrinks a run."""
