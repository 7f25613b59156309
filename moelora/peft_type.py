"""The name of the method among PEFT's."""

from peft.utils import PeftType


def _add_peft_type(name: str) -> PeftType:
    """Extend PEFT's enum. transformers reads `peft_type.value`, so a plain string is not enough."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


MOELORA = _add_peft_type("MOELORA")
