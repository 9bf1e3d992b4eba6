"""The annotation of an argument is its check: one mechanism for functions, constructors and settings.

`Checked` is the metaclass of solvers, operators, priors, rewards and noise laws, `checked` decorates functions.
What is annotated `int`, `float`, `bool`, `str`, `Literal`, `Tensor`, a class, a callable, a tuple or a union of these
is converted where that is plain (numbers and arrays of numpy, lists), and else refused by an `InputError`; `Annotated`
with a rule narrows it, as `Count`, `Positive` and others of `arguments.rules` do. Of classes outside of this package
only `Annotated` is looked at.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import os
import sys
import types
import typing
from abc import ABCMeta
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from invguide.arguments.arrays import Refused
from invguide.arguments.entries import entry
from invguide.arguments.rules import (
    AnyOf,
    Array,
    Dtype,
    Entries,
    Flag,
    Function,
    Instance,
    Items,
    Nothing,
    Number,
    OneOf,
    Rule,
    shown,
)
from invguide.errors import ArgumentError, InputError, suggest

P = ParamSpec("P")
R = TypeVar("R")


def rule_for(annotation: Any, plain: bool = True) -> Rule | None:
    """Return the rule that an annotation stands for, or None where anything may be passed.

    Args:
        annotation: Evaluated.
        plain: Whether types count, and not only `Annotated` ones.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        own = [extra for extra in inner[1:] if isinstance(extra, Rule)]
        return own[0] if own else rule_for(inner[0], plain)
    if origin in (typing.Union, types.UnionType):
        rules = [rule_for(part, plain or part is type(None)) for part in inner]
        known = tuple(rule for rule in rules if rule is not None)
        told = any(not isinstance(rule, Nothing) for rule in known)
        return AnyOf(known) if told and len(known) == len(rules) else None
    if isinstance(annotation, TypeVar):
        return rule_for(annotation.__bound__, plain)
    if annotation in (None, type(None)):
        return Nothing()
    return _plain_rule(annotation, origin, inner) if plain else None


def _plain_rule(annotation: Any, origin: Any, inner: tuple[Any, ...]) -> Rule | None:
    basic: dict[Any, Rule] = {
        int: Number(whole=True),
        float: Number(),
        bool: Flag(),
        Tensor: Array(),
        np.ndarray: Array(),
        torch.device: Instance((torch.device,)),
        torch.dtype: Dtype(),
    }
    if annotation in basic:
        return basic[annotation]
    if origin is Literal and all(isinstance(option, str) for option in inner):
        return OneOf(inner)
    if origin is tuple and inner:
        rules = [rule_for(part) for part in inner if part is not ...]
        if any(rule is None for rule in rules):
            return None
        return Items(tuple(rule for rule in rules if rule), fixed=inner[-1] is not ...)
    if origin is collections.abc.Sequence:
        rule = rule_for(inner[0])
        return None if rule is None else Items((rule,))
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        told = inner and isinstance(inner[0], list)
        return Function(len(inner[0]) if told else None)
    if origin in (dict, collections.abc.Mapping):
        return Entries(rule_for(inner[1]))
    kind = origin if isinstance(origin, type) else annotation
    ours = isinstance(kind, type) and kind.__module__.startswith("invguide.")
    if kind in (str, nn.Module) or ours:
        return Instance((typing.cast("type", kind),))
    if isinstance(kind, type) and issubclass(typing.cast("type", kind), Path):
        return Instance((str, os.PathLike))
    return None


def _evaluated(annotation: Any, home: dict[str, Any]) -> Any:
    """An annotation as an object; Any where it names what is imported for type checkers only."""
    if not isinstance(annotation, str):
        return annotation

    def probe() -> None: ...

    probe.__annotations__ = {"value": annotation}
    try:
        return typing.get_type_hints(probe, home, include_extras=True)["value"]
    except (NameError, AttributeError, TypeError):
        return Any


@dataclass(frozen=True)
class _Signature:
    """How something is called, and the rules of its parameters."""

    call: inspect.Signature
    rules: dict[str, Rule]
    others: dict[str, Rule | None] | None  # of **keywords, where it is known what they are

    def bind(
        self, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> inspect.BoundArguments:
        """Return the arguments, converted.

        Raises:
            ArgumentError: Unknown, missing or too many arguments.
            InputError: One that breaks its rule.
        """
        names = [p.name for p in self.call.parameters.values() if p.kind not in (0, 2, 4)]
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self.call.parameters.values())
        known = [*names, *(self.others or ())]
        for name in kwargs:
            if name not in known and not (open_ended and self.others is None):
                hint = suggest(name, known) if known else "it takes none"
                raise ArgumentError(f"{who} has no argument {name!r}; {hint}")
        try:
            bound = self.call.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{who}: {error}") from None
        for name, value in bound.arguments.items():
            parameter, rule = self.call.parameters[name], self.rules.get(name)
            if parameter.kind is parameter.VAR_KEYWORD:
                value.update(
                    (n, check(who, n, v, (self.others or {}).get(n))) for n, v in value.items()
                )
            elif parameter.kind is parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(check(who, name, v, rule) for v in value)
            else:
                bound.arguments[name] = check(who, name, value, rule)
        return bound


def check(who: str, name: str, value: Any, rule: Rule | None) -> Any:
    """Return the value as its rule takes it, or raise InputError."""
    if rule is None:
        return value
    try:
        return rule.take(value)
    except Refused as refused:
        wanted = str(refused) or f"expected {rule.expected}"
        raise InputError(f"{who}: {name} is {shown(value)}; {wanted}") from None


def _rules(
    parameters: Iterable[inspect.Parameter], home: dict[str, Any], plain: bool
) -> dict[str, Rule]:
    found = {p.name: rule_for(_evaluated(p.annotation, home), plain) for p in parameters}
    return {name: rule for name, rule in found.items() if rule is not None}


@cache
def _of_class(kind: type) -> _Signature | None:
    own = kind.__module__.partition(".")[0] == "invguide"
    init = kind.__init__
    if init in (nn.Module.__init__, object.__init__):
        return _Signature(inspect.Signature(), {}, None) if own else None
    parameters = list(inspect.signature(init).parameters.values())[1:]
    rules: dict[str, Rule] = {}
    if dataclasses.is_dataclass(kind):
        # A field that a subclass declares again, with another default, keeps the rule of its base.
        for base in reversed(kind.__mro__):
            home = vars(sys.modules.get(base.__module__, sys))
            ours = base.__module__.partition(".")[0] == "invguide"
            for name, text in inspect.get_annotations(base).items():
                annotation = _evaluated(text, home)
                rule = rule_for(annotation, ours and name not in rules)
                rules |= {} if rule is None else {name: rule}
    else:
        rules = _rules(parameters, vars(sys.modules[init.__module__]), own)
    return _Signature(inspect.Signature(parameters), rules, None)


class _Later:
    """The signature of a method, looked at when it is first called: its annotations may name what comes after it."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def bind(
        self, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> inspect.BoundArguments:
        return _of_method(self.method).bind(who, args, kwargs)


@cache
def _of_method(method: Callable[..., Any]) -> _Signature:
    call = inspect.signature(method)
    return _Signature(call, _rules(call.parameters.values(), method.__globals__, True), None)


def expected_arguments(kind: type) -> dict[str, str]:
    """Return what each argument of a constructor may be, in words, where that is checked."""
    signature = _of_class(kind)
    return {} if signature is None else {n: r.expected for n, r in signature.rules.items()}


class Checked(ABCMeta):
    """Metaclass of an abstract class whose constructors check their arguments by their annotations.

    The methods that `entries` names do so too, see `invguide.arguments.entries`.
    """

    def __new__(
        mcls, name: str, bases: tuple[type, ...], space: dict[str, Any], **more: Any
    ) -> Any:
        if space.get("__module__", "").partition(".")[0] == "invguide":
            named = {n for base in bases for n in getattr(base, "entries", ())}
            for method in named.union(space.get("entries", ())):
                own = space.get(method)
                if inspect.isfunction(own) and not getattr(own, "__isabstractmethod__", False):
                    space[method] = entry(own, _Later(own).bind)
        return super().__new__(mcls, name, bases, space, **more)

    if not TYPE_CHECKING:  # a type checker looks at __init__, and so shall `help`

        @property
        def __signature__(cls) -> inspect.Signature:
            own = inspect.signature(cls.__init__)
            return own.replace(parameters=list(own.parameters.values())[1:])

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            signature = _of_class(cls)
            if inspect.isabstract(cls):
                raise ArgumentError(
                    f"{cls.__name__} is abstract; expected a subclass that has "
                    f"{', '.join(sorted(cls.__abstractmethods__))}"
                )
            if signature is None:
                return super().__call__(*args, **kwargs)
            bound = signature.bind(cls.__name__, args, kwargs)
            return super().__call__(*bound.args, **bound.kwargs)


def checked(function: Callable[P, R], also: Callable[..., Any] | None = None) -> Callable[P, R]:
    """Return a function whose arguments are checked by their annotations.

    Args:
        function: Of this package.
        also: Another whose keyword-only arguments its **keywords are.
    """
    others: dict[str, Rule | None] | None = None
    call = inspect.signature(function)
    rules = _rules(call.parameters.values(), function.__globals__, True)
    if also is not None:
        more = [p for p in inspect.signature(also).parameters.values() if p.kind is p.KEYWORD_ONLY]
        known = _rules(more, inspect.unwrap(also).__globals__, True)
        others = {p.name: known.get(p.name) for p in more}
    signature = _Signature(call, rules, others)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(function.__qualname__, args, dict(kwargs))
        return function(*bound.args, **bound.kwargs)

    return wrapper
