"""Make HUT one of PEFT's methods: a member of its type, an entry in each of its mappings."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

_NAME = "HUT"


def peft_type() -> Any:
    """`PeftType.HUT`, added to the enumeration where PEFT does not have it.

    It must be a true member: `transformers` and PEFT read `.value` and look for it in `PeftType`.
    """
    if _NAME not in PeftType.__members__:
        member = str.__new__(PeftType, _NAME)
        member._name_ = member._value_ = _NAME
        member._sort_order_ = len(PeftType.__members__)
        setattr(PeftType, _NAME, member)
        PeftType._member_names_.append(_NAME)
        PeftType._member_map_[_NAME] = member
        PeftType._value2member_map_[_NAME] = member
    return PeftType(_NAME)


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Enter the tuner in PEFT's mappings; once, however often it is called.

    Raises:
        ImportError: this PEFT has a method called HUT from somewhere else.
    """
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if present is None:
        register_peft_method(name="hut", config_cls=config_cls, model_cls=model_cls)
    elif present is not config_cls:
        raise ImportError(
            f"PEFT already has a method HUT, {present.__module__}.{present.__qualname__}: "
            f"hut_kernels cannot register its own beside it"
        )
