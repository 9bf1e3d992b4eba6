"""What a user has becomes ours: callables, modules, linear maps, deepinv physics, rewards of any kind."""

from invguide.adapters.operators import (
    FunctionOperator,
    LinearFunctionOperator,
    as_operator,
    to_deepinv,
)
from invguide.renamed import old_names

__all__ = ["FunctionOperator", "LinearFunctionOperator", "as_operator", "to_deepinv"]

__getattr__ = old_names(__name__)
