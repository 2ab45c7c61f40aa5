"""MONKEYPATCH of timm (1.0.20 to 1.0.31): its reader of WebDataset shards.

timm passes `log_and_continue` to the webdataset package as the handler of errors: what cannot be
read is left out with a warning. There is no argument for another handler, so the function is
replaced in timm's module, by one that lists the shard or image as unreadable.
"""

import re

from timm.data.readers import reader_wds

from input_pipeline.unreadable import UnreadableImages

_log_and_continue = reader_wds.log_and_continue


def list_damaged_shards(unreadable: UnreadableImages) -> None:
    """From here on, timm's reader of WebDataset lists what it leaves out."""

    def handle(error: Exception) -> bool:
        _log_and_continue(error)  # raises errors that only a wrong flag explains
        *_, name = error.args or ("",)
        is_shard = isinstance(name, str) and name.endswith(".tar")
        # images have no names there, and would count again in each epoch by their addresses
        reason = re.sub(" at 0x[0-9a-f]+", "", repr(error))
        unreadable.add(name if is_shard else "an image of a shard", reason)
        return True

    reader_wds.log_and_continue = handle
