"""The options of polyattn: one frozen dataclass, every field documented, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

from polyattn.errors import OptionValueError, UnknownOptionError

log = logging.getLogger("polyattn")

Policy = Literal["auto", "low_rank", "exact"]
Features = Literal["auto", "clustered", "polynomial", "skeleton", "random"]
Gradient = Literal["auto", "consistent", "substituted"]
Inner = Literal["inductor", "eager"]
Polynomial = Literal["taylor", "minimax", "least_squares"]
CausalStats = Literal["call", "first_chunk"]

MAX_OUTLIERS = 1024
"""Keys that are exact for every query: each costs as much as two features."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="polyattn", options={...})`` and ``polyattn.attention``.

    Raises:
        OptionValueError: a value lies outside its domain; the message names the domain.
    """

    tolerance: float = 2e-2
    """Additive bound on a row of the output: ``|õ_i - o_i| <= tolerance * max_j |v_j - mean(v)|`` (math.md §5)."""
    relative_tolerance: float = 0.1
    """Bound on ``RMS_i |õ_i - o_i| / RMS_i |o_i - mean(v)|``: the part that is not mean pooling (math.md §5)."""
    gradient_tolerance: float = 0.1
    """Bound on the relative Frobenius error of dQ, dK and dV; recorded for the planner, not yet enforced."""
    policy: Policy = "auto"
    """``auto``: low rank where it is cheaper and an audit holds; ``low_rank``: always; ``exact``: only fuse."""
    features: Features = "auto"
    """What stands in place of exp. ``clustered``: tiles of similar tokens at every call, near pairs of tiles exact, the
    others expanded (math.md §8): for the heads of trained models, nothing is fitted; ``polynomial``: monomials of
    queries and keys, for small logits; ``skeleton``: exponentials of landmarks that are fitted to a head at its first
    call and kept (math.md §2); ``random``: positive random features (FAVOR+), drawn for each head at its first call;
    ``auto``: a polynomial while its audits hold, then (``policy="auto"``) ``clustered`` where that is faster than exact
    attention."""
    degree: int | None = None
    """Degree of the polynomial in place of exp, 1 to 4; None means 2. ``clustered``: order of the expansion, 0 to 2;
    None means 1."""
    polynomial: Polynomial = "taylor"
    """Coefficients of the polynomial. ``taylor``: of exp around 0; ``minimax``: of least relative error up to the
    largest logit that a head shows at its first call, 4 at most; ``least_squares``: fitted to the softmax rows of a
    head at its first call and kept (math.md §4)."""
    rank: int | None = None
    """Features of a query or key, at most. Skeleton features: the number of landmarks, 8 to 2048; None means 512.
    Random features: 8 to 4096; None means 256. ``clustered``: tokens of a tile, 8 to 1024; None: near the root of n.
    Polynomials: monomials of the higher degrees are taken in the leading directions of a head only, in coordinates that
    are fitted at its first call (nested form, math.md §3); None: all monomials, C(d + degree, degree)."""
    centring: bool = True
    """Subtract mean query and mean key of a head before exp is approximated: exact by itself, and the logits that are
    left are smaller (math.md §3)."""
    causal_stats: CausalStats = "call"
    """Under a causal mask, which tokens those means are taken of. ``call``: all of the call, so that an output depends
    on later tokens by no more than the approximation error; ``first_chunk``: the first chunk, as a decoder would."""
    gradient: Gradient = "auto"
    """``consistent``: exact gradient of the function computed; ``substituted``: the low-rank form put into exact
    attention's gradient (the paper); ``auto`` means ``consistent``."""
    value_directions: int | None = None
    """Projection rank of the values in the substituted gradient, whose cost is proportional to (e + 1) d: values are
    projected on so many leading directions of the products with the output's gradient, in place of e; None: they are
    not."""
    key_directions: int | None = None
    """Projection rank of queries and keys there, in place of d: keys are projected on the leading directions of dQ on
    sampled rows, and queries on their own; None: they are not."""
    local_window: int | None = None
    """Without a mask, keys of a query's own chunk and of the two next to it stay exact, chunks of so many tokens: all
    keys at most that far away. For heads that look at their neighbourhood; None: no key. Under a causal mask the chunk
    itself is exact (``causal_chunk``)."""
    outlier_keys: int = 0
    """So many keys of each head stay exact for every query: those of the largest norm around the mean key (with
    ``causal_stats="first_chunk"`` under a causal mask, of the first chunk)."""
    exact_keys: tuple[int, ...] = ()
    """Positions of further keys that stay exact for every query, such as an attention sink at 0."""
    causal_chunk: int | None = None
    """Tokens per chunk under a causal mask (exact exp inside a chunk), of clustered attention at least so many per
    segment; None chooses, a chunk near the rank."""
    audit_rows: int = 64
    """Rows of an audited call that are computed exactly and compared (0: no audit; ``auto`` then stays exact)."""
    audit_every: int = 8
    """A low-rank site is audited at its first call and every so many calls after it, each time on fresh rows; 0: only
    at the first. Under ``auto`` a failed audit makes the site exact from that call on; under ``low_rank`` it is
    reported, and logged once."""
    refit: bool = True
    """Whether what is fitted to a head is fitted anew, to the present call, when an audit of a later call fails or more
    than an eighth of a call's rows had to be computed exactly; not sooner than ``audit_every`` calls after the last
    time, and after twice as many each time that it did not help. Under ``auto`` a site becomes exact when its new fit
    fails as well."""
    inner: Inner = "inductor"
    """Compiler of everything around the attention."""
    inner_options: Mapping[str, Any] | None = None
    """Options handed to inductor, e.g. ``{"mode": "max-autotune"}`` (torch.compile refuses mode= beside options=)."""
    expect_sites: int | None = None
    """Raise ExpectSitesError when a compiled graph holds fewer attention sites than this."""
    seed: int = 0
    """Seed of polyattn's own random choices (audit rows); torch's generators are never touched."""

    def __post_init__(self) -> None:
        from polyattn.rewriter.families.registry import families

        kinds = (
            ("policy", Policy),
            ("features", Features),
            ("gradient", Gradient),
            ("inner", Inner),
            ("polynomial", Polynomial),
        )
        for name, kind in (*kinds, ("causal_stats", CausalStats)):
            _check(name, getattr(self, name) in get_args(kind), getattr(self, name), f"one of {get_args(kind)}")
        for name in ("centring", "refit"):
            _check(name, isinstance(getattr(self, name), bool), getattr(self, name), "True or False")
        for name in ("tolerance", "relative_tolerance", "gradient_tolerance"):
            value = getattr(self, name)
            _check(name, isinstance(value, (int, float)) and value > 0, value, "a positive number")
        for name, value, domain in families(self)[0].problems(self):
            _check(name, False, value, domain)
        for name in ("value_directions", "key_directions"):
            count = getattr(self, name)
            good = count is None or (_is_int(count) and count >= 1 and self.gradient == "substituted")
            _check(name, good, count, "an integer >= 1 beside gradient='substituted', or None")
        for name in ("causal_chunk", "local_window"):
            size = getattr(self, name)
            _check(name, size is None or (_is_int(size) and size >= 1), size, "a positive integer or None")
        count, named = self.outlier_keys, self.exact_keys
        domain = f"an integer from 0 to {MAX_OUTLIERS}"
        _check("outlier_keys", _is_int(count) and 0 <= count <= MAX_OUTLIERS, count, domain)
        _check(
            "exact_keys",
            isinstance(named, (tuple, list))
            and all(_is_int(p) and p >= 0 for p in named)
            and len(named) <= MAX_OUTLIERS,
            named,
            f"a tuple of at most {MAX_OUTLIERS} positions, each an integer >= 0",
        )
        object.__setattr__(self, "exact_keys", tuple(sorted(set(named))))
        _check("audit_rows", _is_int(self.audit_rows) and self.audit_rows >= 0, self.audit_rows, "an integer >= 0")
        _check("audit_every", _is_int(self.audit_every) and self.audit_every >= 0, self.audit_every, "an integer >= 0")
        sites = self.expect_sites
        _check("expect_sites", sites is None or (_is_int(sites) and sites >= 0), sites, "an integer >= 0 or None")
        _check("seed", _is_int(self.seed), self.seed, "an integer")

    @classmethod
    def make(cls, options: Options | Mapping[str, Any] | None) -> Options:
        """Options from a mapping (or as they are).

        Raises:
            UnknownOptionError: a name that is not a field; the message names the closest one.
            OptionValueError: a value outside its domain.
        """
        if options is None:
            return cls()
        if isinstance(options, Options):
            return options
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known and name not in RENAMED:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
                raise UnknownOptionError(f"polyattn has no option {name!r}; {hint}")
        return cls(**options)

    def key(self) -> str:
        """The fields that change what a site computes, as canonical JSON: the ``options`` argument of the ops."""
        skip = {"inner", "inner_options", "expect_sites"}
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if k not in skip}, sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> Options:
        """The inverse of :meth:`key`."""
        return cls(**json.loads(key))


FIT_FIELDS = (
    "features", "degree", "polynomial", "rank", "centring", "causal_stats", "local_window", "causal_chunk",
    "outlier_keys", "exact_keys",
)  # fmt: skip
"""Options that what is fitted to a head depends on."""
RENAMED = {"heavy_keys": "outlier_keys", "near_field": "local_window", "shift": "centring"}
"""Options that had another name before: the old one still works, and a note is logged."""


def _with_old_names(init: Any) -> Any:
    """The constructor, which takes options by their former names as well.

    Raises:
        OptionValueError: an option is given by both of its names.
    """

    @functools.wraps(init)
    def __init__(self: Options, *args: Any, **given: Any) -> None:
        for old, new in RENAMED.items():
            if old not in given:
                continue
            if new in given:
                raise OptionValueError(f"polyattn options {old!r} and {new!r} are the same; give {new!r} alone")
            _note_rename(old, new)
            given[new] = given.pop(old)
        init(self, *args, **given)

    return __init__


@functools.cache
def _note_rename(old: str, new: str) -> None:
    log.warning("polyattn: the option %r is called %r now; the old name still works", old, new)


Options.__init__ = _with_old_names(Options.__init__)  # type: ignore[method-assign]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, good: bool, value: object, domain: str) -> None:
    if not good:
        raise OptionValueError(f"polyattn option {name}={value!r}: it must be {domain}")
