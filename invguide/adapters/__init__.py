"""What a user has becomes ours: callables, modules, linear maps, deepinv physics, rewards of any kind."""

from invguide.adapters.operators import (
    FunctionOperator,
    LinearFunctionOperator,
    as_operator,
    to_deepinv,
)

__all__ = ["FunctionOperator", "LinearFunctionOperator", "as_operator", "to_deepinv"]
