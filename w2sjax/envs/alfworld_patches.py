"""What makes TextWorld's PDDL environment 20 times faster, with the same text.

`patched()` puts these in place while one of our engines works, and takes them away after that, so
that other users of the packages in the process see no change:

- parsed grammar symbols and queries are kept by their text;
- contexts of the grammar are copied shallowly (they are only read);
- a game's logic is parsed once for all games that differ in the sentence of their task alone;
- the translation of a PDDL problem to SAS is kept for the games played last, and the second one,
  which serves the planner alone, is left out (nothing here plans with it);
- expressions in the grammar are evaluated by a small interpreter of attributes, texts, `+` and
  `or`, since a game file is data: the package calls `eval` on them.

Each is for the version that it was written for; under another, what does not look as expected stays
as the package has it, which costs time and nothing else. The last one is never left out.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import functools
import importlib
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_VERSIONS = ("1.7.",)  # of textworld
_KEPT_CHARS = 16_000_000  # of SAS text: some 80 whole floor plans, 600 small games; about 70 MB
_GOAL = re.compile(r'"rhs": "(Your task is to: [^"\\#{}\[\]]*)"')
_MARK = "Your task is to: GOAL"
_ATTRIBUTES = frozenset(("id", "type", "name", "noun", "adj", "desc", "definite", "indefinite"))

_depth = 0
_lock = threading.RLock()  # the patches are in place for one thread at a time


@contextlib.contextmanager
def patched(fast: bool = True) -> Iterator[None]:
    """The packages as an engine wants them, inside the block.

    Args:
      fast: False leaves everything as the packages have it, the use of `eval` too.
    """
    global _depth
    if not fast:
        yield
        return
    with _lock:
        patches = _patches() if _depth == 0 else ()
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
        _depth += 1
        try:
            for owner, name, replacement in patches:
                setattr(owner, name, replacement)
            yield
        finally:
            _depth -= 1
            for owner, name, original in originals:
                setattr(owner, name, original)


@functools.cache
def _patches() -> tuple[tuple[Any, str, Callable], ...]:
    """(owner, attribute, replacement) of every patch that fits the installed packages."""
    textworld = importlib.import_module("textworld")
    symbols = importlib.import_module("textworld.envs.pddl.textgen")
    logic = importlib.import_module("textworld.envs.pddl.logic")
    queries = importlib.import_module("textworld.logic")
    fast_downward = importlib.import_module("fast_downward")
    found = [(symbols.EvalSymbol, "derive", _make_derive(symbols))]
    if not textworld.__version__.startswith(_VERSIONS):
        return tuple(found)
    if hasattr(symbols, "_parse_and_convert") and hasattr(symbols, "_PARSER"):
        found.append((symbols, "_parse_and_convert", _make_parse_symbols(symbols)))
        if hasattr(logic, "_parse_and_convert"):
            found.append((logic, "_parse_and_convert", _make_parse_logic(logic, symbols)))
    if hasattr(symbols, "copy_context"):
        found.append((symbols, "copy_context", _copy_context))
    if hasattr(queries, "_parse_and_convert"):
        found.append((queries, "_parse_and_convert", _make_parse_query(queries)))
    if hasattr(fast_downward, "pddl2sas"):
        found.append((fast_downward, "pddl2sas", _make_translate(fast_downward.pddl2sas)))
    return tuple(found)


# --------------------------------------------------------------------------------------- grammar


def _copy_context(context: dict) -> dict:
    return {**context, "variables": dict(context["variables"]), "mapping": dict(context["mapping"])}


def _make_parse_symbols(symbols: Any) -> Callable:
    original = symbols._parse_and_convert
    parse = functools.lru_cache(4096)(lambda text, rule: tuple(original(text, rule_name=rule)))

    def fresh(symbol: Any) -> Any:
        """A copy: whoever derives from a symbol sets its context."""
        made = copy.copy(symbol)
        for part in ("symbol", "expression"):
            inner = getattr(made, part, None)
            if isinstance(inner, symbols.Symbol):
                setattr(made, part, fresh(inner))
        return made

    def parse_and_convert(text: str, rule_name: str = "symbols", trace: bool = False) -> list:
        if trace or rule_name != "symbols":
            return original(text, rule_name=rule_name, trace=trace)
        return [fresh(symbol) for symbol in parse(text, rule_name)]

    return parse_and_convert


def _make_parse_query(queries: Any) -> Callable:
    original = queries._parse_and_convert
    parse = functools.lru_cache(4096)(lambda text, rule: tuple(original(text, rule_name=rule)))

    def parse_and_convert(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and kwargs == {"rule_name": "conjunctiveQuery"}:
            return list(parse(args[0], "conjunctiveQuery"))
        return original(*args, **kwargs)

    return parse_and_convert


def _make_parse_logic(logic: Any, symbols: Any) -> Callable:
    original = logic._parse_and_convert

    @functools.lru_cache(8)
    def parse(text: str) -> tuple[dict, Any]:
        return original(text, rule_name="pddlStart")

    def parse_and_convert(text: str, rule_name: str) -> tuple[dict, Any]:
        goals = _GOAL.findall(text)
        if rule_name != "pddlStart" or len(goals) != 1:
            return original(text, rule_name=rule_name)
        actions, shared = parse(text.replace(goals[0], _MARK))
        grammar = symbols.ContextSensitiveGrammar()
        for name, rules in shared._rules.items():
            for rule in rules:
                if len(rule.rhs) == 1 and str(rule.rhs[0]) == _MARK:
                    right = symbols._parse_and_convert(goals[0], rule_name="symbols")
                    rule = symbols.ProductionRule(name, right, rule.weight, rule.condition)
                grammar.add_rule(rule)
        return dict(actions), grammar

    return parse_and_convert


# ------------------------------------------------------------------------------------ expressions


def _make_derive(symbols: Any) -> Callable:
    def derive(self: Any, context: dict | None = None) -> list:
        variables = (context or self.context)["variables"]
        return [symbols.TerminalSymbol(_evaluate(_parsed(self.expression), variables))]

    return derive


@functools.lru_cache(1024)
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the grammar has {expression[:100]!r}: {error}") from None


def _evaluate(node: ast.expr, variables: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) if name in variables:
            return variables[name]
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if (
            name in variables and attribute in _ATTRIBUTES
        ):
            return getattr(variables[name], attribute)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, variables) + _evaluate(right, variables)
        case ast.BoolOp(op=ast.Or(), values=values):
            return next(filter(None, (_evaluate(value, variables) for value in values)), "")
    raise ValueError(f"the grammar has an expression that is not evaluated: {ast.unparse(node)}")


# ------------------------------------------------------------------------------------ translation


def _make_translate(original: Callable) -> Callable:
    kept: collections.OrderedDict[tuple[str, str], tuple[Any, str]] = collections.OrderedDict()
    chars = 0

    def pddl2sas(
        domain: str, problem: str, verbose: bool = False, optimize: bool = False
    ) -> tuple[Any, str]:
        nonlocal chars
        key = (domain, problem)
        if key not in kept:
            argv = sys.argv  # the translator replaces it
            try:
                kept[key] = original(domain, problem, verbose=verbose)
            finally:
                sys.argv = argv
            chars += len(kept[key][1])
            while chars > _KEPT_CHARS and len(kept) > 1:
                _, (_, sas) = kept.popitem(last=False)
                chars -= len(sas)
        kept.move_to_end(key)
        return kept[key]

    return pddl2sas


# ---------------------------------------------------------------------------------------- library


@contextlib.contextmanager
def small_library(fast: bool = True) -> Iterator[None]:
    """Lets engines made inside the block load the planner's library without its debug information.

    Every engine loads a copy of its own, and a copy takes room on the disk as long as the process
    lives: 34 MB as the package ships it, of which 1 MB is ever loaded.
    """
    interface = importlib.import_module("fast_downward.interface")
    original = getattr(interface, "DOWNWARD_LIB_PATH", None)
    part = _loaded_part(Path(original)) if fast and original else None
    if part is None:
        yield
        return
    with _lock, tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / Path(original).name
        small.write_bytes(part)
        interface.DOWNWARD_LIB_PATH = str(small)
        try:
            yield
        finally:
            interface.DOWNWARD_LIB_PATH = original


def _loaded_part(path: Path) -> bytes | None:
    """The start of a shared library, up to the last byte that is loaded; None for other formats."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:  # 64 bits, little-endian
            return None
        (table,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(table)
        headers = file.read(size * count)
        end = table + size * count
        for index in range(count):
            kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", headers, index * size)
            if kind == 1:  # PT_LOAD
                end = max(end, offset + length)
        file.seek(0)
        return file.read(end)
