"""pytest plugin for timm's own model tests: `pytest -p tests.timm_plugin test_models.py -k hornet`.

Registers this project's models, and adds their module to the test file's FEAT_INTER_FILTERS,
the list of modules whose models are tested with forward_intermediates.
"""

import timm

import models  # noqa: F401 - registers the models

MODULE = "variants"  # timm knows a model by the last part of the module that registered it
_list_models = timm.list_models


def list_models(filter="", module="", **kwargs):  # noqa: A002 - timm's signature
    """timm's list_models; the test file passes FEAT_INTER_FILTERS, a list, as `module`."""
    if isinstance(module, list) and "convnext" in module and MODULE not in module:
        module.append(MODULE)
    return _list_models(filter, module, **kwargs)


timm.list_models = list_models  # type: ignore[assignment]
