"""A pytest plugin: `HUTConfig` in the parametrized lists of PEFT's tests, and nothing but it.

With `HUT_PEFT_SUITE=hira`, PEFT's own HiRA cases instead, on accelerated models; the file `FUSED`
then tells that a fused layer did run.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import peft
import pytest
from peft.tuners.hira import HiraModel

from hut_kernels.integrations.peft import HUTConfig, accelerate_hira, hira

HIRA = os.environ.get("HUT_PEFT_SUITE") == "hira"
CONFIG = peft.HiraConfig if HIRA else HUTConfig
FUSED = "a-fused-layer-ran"

_TWO_SIDED = {"transform": "two_sided", "r": 4}
_PAPER = _TWO_SIDED | {"scale_shift": True}
_RANDOM = {"init_weights": False}

# test_custom_models.py: name, model, class, options.
CUSTOM = [
    (f"{name} HUT", model, HUTConfig, options)
    for name, model, options in (
        ("MLP 1", "MLP", {"target_modules": "lin0"}),
        ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
        ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
        ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
        ("MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("MLP dropout", "MLP", {"target_modules": ["lin0"], "hut_dropout": 0.1}),
        ("MLP alpha", "MLP", {"target_modules": ["lin0"], "r": 4, "hut_alpha": 16}),
        ("MLP offset 0", "MLP", {"target_modules": ["lin0"], "offset": 0, "r": 4}),
        ("MLP two_sided", "MLP", {"target_modules": ["lin0"], **_TWO_SIDED}),
        ("MLP paper", "MLP", {"target_modules": ["lin0"], **_PAPER}),
        ("MLP split", "MLP", {"target_modules": ["lin0"], "precision": "split"}),
        ("MLP unfused", "MLP", {"target_modules": ["lin0"], "fused": False}),
        ("Conv1D of transformers", "EmbConv1D", {"target_modules": ["conv1d"], "hut_alpha": 64}),
        ("Conv1D paper", "EmbConv1D", {"target_modules": ["conv1d"], "transform": "two_sided",
                                       "r": 1, "scale_shift": True}),
    )
]  # fmt: skip
SEVERAL = [
    (f"HUT {name} {which}", "hut", HUTConfig, options | {"target_modules": ["lin0"]},
     options | {"target_modules": [target]})
    for name, options in (
        ("low_rank", _RANDOM),
        ("direct", _RANDOM | {"offset": 0}),
        ("two_sided", _RANDOM | {"transform": "two_sided", "r": 2}),
        ("paper", _RANDOM | {"transform": "two_sided", "r": 2, "scale_shift": True}),
    )
    for which, target in (("same", "lin0"), ("different", "lin1"))
]  # fmt: skip


def _task(task_type, **options):
    return (HUTConfig, {"task_type": task_type, "target_modules": None, **options})


ADDITIONS = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM,
        "ALL_PEFT_CONFIG_CLASSES": [HUTConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL,
    },
    "test_decoder_models": {"ALL_CONFIGS": [_task("CAUSAL_LM")]},
    "test_encoder_decoder_models": {"ALL_CONFIGS": [_task("SEQ_2_SEQ_LM")]},
    "test_feature_extraction_models": {"ALL_CONFIGS": [_task("FEATURE_EXTRACTION")]},
    "test_seq_classifier": {"ALL_CONFIGS": [_task("SEQ_CLS")]},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": [_task("TOKEN_CLS")],
        "QA_CONFIGS": [_task("QUESTION_ANS")],
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(HUTConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(HUTConfig, {})],
    },
}

# What PEFT's tests import at their top and the chosen ones do not use.
for _name, _attribute in (("datasets", "load_dataset"), ("diffusers", "StableDiffusionPipeline")):
    if importlib.util.find_spec(_name) is None:
        _module = types.ModuleType(_name)
        _module.__spec__ = importlib.machinery.ModuleSpec(_name, None)
        setattr(_module, _attribute, type(_attribute, (), {}))
        sys.modules[_name] = _module


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Extends the list behind each parametrize mark before the tests are made from it."""
    module = metafunc.module
    additions = {} if HIRA else ADDITIONS.get(module.__name__.rpartition(".")[2], {})
    for mark in metafunc.definition.iter_markers("parametrize"):
        for attribute, cases in additions.items():
            if mark.args[1] is getattr(module, attribute):
                extended = (mark.args[0], [*mark.args[1], *cases])
                object.__setattr__(mark, "args", extended)


def pytest_collection_modifyitems(config, items):
    """Leaves the tests of `CONFIG`."""
    chosen, others = [], []
    for item in items:
        params = getattr(item, "callspec", None)
        ours = params is not None and CONFIG in list(params.params.values())
        (chosen if ours else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


if HIRA:
    _inject, _fused = HiraModel.inject_adapter, hira.hut_linear

    def _fused_and_told(*args, **kwargs):
        Path(FUSED).touch()
        return _fused(*args, **kwargs)

    def _inject_and_accelerate(self, model, *args, **kwargs):
        _inject(self, model, *args, **kwargs)
        accelerate_hira(model)

    HiraModel.inject_adapter = _inject_and_accelerate
    hira.hut_linear = _fused_and_told
