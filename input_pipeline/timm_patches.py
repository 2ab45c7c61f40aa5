"""MONKEYPATCH of timm 1.0.20 to 1.0.31: its reader of WebDataset shards.

timm's error handler, `log_and_continue`, skips unreadable shards and images with a warning. It
cannot be chosen by an argument, so it is replaced in timm's module.
"""

import re

from timm.data.readers import reader_wds

from input_pipeline.unreadable import UnreadableImages

_log_and_continue = reader_wds.log_and_continue


def list_damaged_shards(unreadable: UnreadableImages) -> None:
    """Let timm's reader of WebDataset list what it skips, from here on."""

    def handle(error: Exception) -> bool:
        _log_and_continue(error)  # raises errors due to wrong arguments
        *_, name = error.args or ("",)
        is_shard = isinstance(name, str) and name.endswith(".tar")
        # without addresses, so that an image, which has no name here, counts once
        reason = re.sub(" at 0x[0-9a-f]+", "", repr(error))
        unreadable.add(name if is_shard else "an image of a shard", reason)
        return True

    reader_wds.log_and_continue = handle
