"""The catalogue of rules, docs/rules.md: what each says of itself, and which derivations apply it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from polyattn.options import Options
from polyattn.passes.derive.derive import Together, exact_pipeline, pipeline
from polyattn.passes.derive.forms import softmax
from polyattn.rewriter.families.registry import FAMILIES
from polyattn.rewriter.masks.mask import CAUSAL
from polyattn.rewriter.rules.rule import ApproximateRule, Rule

HEAD = """# Rules

Every derivation is a list of these rules (`pipeline` of `passes/derive/derive.py`); each is a value with a formula, a
source, a check that gives a reason and a rewrite (`rewriter/rules/rule.py`). Before and after each of them the verifier
(`rewriter/algebra/verify.py`) checks that every index is bound, that definitions come before their use, and that the
outputs are those that the rule declares. Sections (§) are those of the mathematics that the sources name: 1 exact
attention and its autograd graph, 2 low-rank substitution, 3 exact transformations, 4 approximations of exp, 6 causal
masks.

Written by `make golden`; `tests/rewriter/rules/test_catalogue.py` keeps this page true.
"""


def catalogue() -> str:
    """The page, in Markdown."""
    families = [family.of(Options()).rule for family in FAMILIES.values()]
    lists = dict(_pipelines(families))
    used: dict[type[Rule], list[str]] = {}
    first: dict[type[Rule], Rule] = {}
    for title, rules in lists.items():
        for rule in rules:
            first.setdefault(type(rule), rule)
            if title not in used.setdefault(type(rule), []):
                used[type(rule)].append(title)
    others = [rule for kind, rule in first.items() if not issubclass(kind, ApproximateRule)]
    names = [rule.name for rule in others]
    approximate = [_approximate(rule) for rule in families]
    exact = [_exact(rule, names.count(rule.name) > 1, used[type(rule)], len(lists)) for rule in others]
    parts = [HEAD, "## Derivations of softmax attention under a causal mask\n", _lists(lists)]
    parts += ["## Approximate rules\n", *approximate, "## Exact rules, and those of tracing\n", *exact]
    return "\n".join(parts).rstrip() + "\n"


def flat(rules: Sequence[Rule]) -> Iterator[Rule]:
    """The rules of a list, those that a log shows together one by one."""
    for rule in rules:
        yield from flat(rule.rules) if isinstance(rule, Together) else (rule,)


def _pipelines(families: Sequence[ApproximateRule]) -> Iterator[tuple[str, tuple[Rule, ...]]]:
    form = softmax(CAUSAL)
    for rule in families:
        for gradient in rule.gradients:
            yield f"{rule.title}, {gradient}", tuple(flat(pipeline(form, rule, gradient)))
    yield "exact", tuple(flat(exact_pipeline(form)))


def _lists(lists: Mapping[str, Sequence[Rule]]) -> str:
    lines = [f"- {title}: {' → '.join(rule.name for rule in rules)}" for title, rules in lists.items()]
    wrapped = [textwrap.fill(line, 120, subsequent_indent="  ") for line in lines]
    return "\n".join([*wrapped, "", "Without near pairs under the mask there is no *split*.", ""])


def _exact(rule: Rule, ambiguous: bool, used: Sequence[str], every: int) -> str:
    """The section of a rule; of two rules of one name, that of one family alone says which."""
    title = f"{rule.name}, {used[0].partition(', ')[0]}" if ambiguous and len(used) < every else rule.name
    return _section(title, rule, {"Derivations": "all" if len(used) == every else "; ".join(used)})


def _approximate(rule: ApproximateRule) -> str:
    brought = [*(leaf.label for leaf in rule.inputs), *(str(s) for s in rule.scalars)]
    return _section(
        f"{rule.name}, {rule.title}",
        rule,
        {"Domain": rule.domain, "Bound": rule.bound, "Brings": ", ".join(brought)},
    )


def _section(title: str, rule: Rule, more: Mapping[str, str]) -> str:
    said = inspect.getdoc(type(rule)) or ""
    refuses = "nothing: where it finds nothing to do, it leaves a program as it is"
    if type(rule).check is not Rule.check:
        refuses = " ".join((inspect.getdoc(type(rule).check) or "").removeprefix("Refuses ").split()).removesuffix(".")
    rows = {"Source": rule.source, "Log": rule.note, "Refuses": refuses, **more}
    lines = [f"### {title}", "", " ".join(said.replace("``", "`").split()), "", f"    {rule.formula}", ""]
    for name, text in rows.items():
        lines += textwrap.wrap(f"- {name}: {text}", 120, subsequent_indent="  ", break_long_words=False)
    return "\n".join([*lines, ""])
