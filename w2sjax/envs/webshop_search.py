"""BM25 search over product texts, on plain arrays that can be memory-mapped.

The formula is Lucene's (k1 0.9, b 0.4, Porter stems, Lucene's 33 English stop words), as in
WebShop. The arrays come from numpy and the stems from PyStemmer. The package bm25s computes the
same scores (the tests compare them), but starts JAX's backend as soon as it is imported: in every
worker process, where it takes the accelerator.
"""

from __future__ import annotations

import bisect
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

K1 = 0.9
B = 0.4
MAX_QUERY_TOKENS = 1024  # Lucene's own limit, beyond which it raises; here the rest is left out
_MAX_QUERY_CHARS = 20_000
_STOP_WORD_TEXT = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)
STOP_WORDS = frozenset(_STOP_WORD_TEXT.split())
_ROUNDING = 1 - 1e-4  # sums of a query's terms in another order differ by less
_BLOCK = 1 << 22  # postings that are sorted together
_TOKEN = re.compile(r"\w+(?:[.'’]\w+)*")


def tokens(text: str) -> list[str]:
    """Lower-case words without stop words and possessive endings, about as Lucene cuts them."""
    found = []
    for word in _TOKEN.findall(text.lower()):
        word = word.removesuffix("'s").removesuffix("’s")
        if word not in STOP_WORDS:
            found.append(word)
    return found


class _QueryTerm(NamedTuple):
    count: int  # in the query
    texts: np.ndarray  # int32, ascending: where it occurs
    posting_weights: np.ndarray  # float32: what one occurrence in the query adds to each
    top: float  # the most that it adds to any text

    def weights(self, postings: np.ndarray | slice = slice(None)) -> np.ndarray:
        """What the term adds to the score of each text, or of some."""
        return self.count * self.posting_weights[postings]

    def add_to(self, scores: np.ndarray, hits: np.ndarray) -> None:
        """Adds them to the scores of the texts `hits`, in place."""
        few, many = sorted((hits, self.texts), key=len)
        places = np.minimum(np.searchsorted(many, few), len(many) - 1)
        (common,) = np.nonzero(many[places] == few)
        if few is hits:
            scores[common] += self.weights(places[common])
        else:
            scores[places[common]] += self.weights(common)


class SearchIndex:
    """Postings of a collection of texts, term by term.

    Args:
      arrays: what `build_index` returns; views of files do as well as arrays in memory. With `V`
        terms, `P` postings and `N` texts: `term_bytes` uint8, all terms in UTF-8, sorted, one after
        the other; `term_ends` int64[V]; `posting_ends` int64[V]; `posting_texts` int32[P], indices
        of texts; `posting_weights` float32[P], what the term adds to the text's score;
        `top_weights` float32[V], the largest of each term; `num_texts` int64[1], N.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._stem = _stemmer().stemWord
        # Plain views: a memory-mapped array is one, too, but slow to cut.
        self._term_bytes = np.asarray(arrays["term_bytes"])
        self._term_ends = np.asarray(arrays["term_ends"])
        self._ends = np.asarray(arrays["posting_ends"])
        self._texts = np.asarray(arrays["posting_texts"])
        self._weights = np.asarray(arrays["posting_weights"])
        self._tops = np.asarray(arrays["top_weights"])
        self.num_texts = int(arrays["num_texts"][0])

    def search(self, query: str, limit: int) -> tuple[int, ...]:
        """Indices of the texts with the best BM25 scores, at most `limit` and those where a word
        of the query occurs, best first; equals by their order.
        """
        terms = self._query_terms(query)
        hits = self._hopeful(terms, limit)
        scores = np.zeros(len(hits), np.float32)
        for term in terms:
            term.add_to(scores, hits)
        if len(hits) > limit:
            good = scores >= np.partition(scores, -limit)[-limit]
            hits, scores = hits[good], scores[good]
        return tuple(hits[np.argsort(-scores, kind="stable")][:limit].tolist())

    def _query_terms(self, query: str) -> list[_QueryTerm]:
        """The terms of a query that occur anywhere, in its order."""
        found = tokens(query[:_MAX_QUERY_CHARS])[:MAX_QUERY_TOKENS]
        terms = []
        for stem, count in Counter(map(self._stem, found)).items():
            term = self._find(stem.encode(errors="replace"))
            if term is not None:
                postings = slice(self._ends[term - 1] if term else 0, self._ends[term])
                top = count * float(self._tops[term])
                terms.append(_QueryTerm(count, self._texts[postings], self._weights[postings], top))
        return terms

    def _hopeful(self, terms: Sequence[_QueryTerm], limit: int) -> np.ndarray:
        """Indices, ascending, of all texts that may be among the best `limit`, and of few others.

        The terms that can add most come first. Once `limit` texts score more than all terms still
        to come can add, texts with those terms alone are out of the question (MaxScore, Turtle and
        Flood 1995); of the others, those that cannot catch up go after every term.
        """
        terms = sorted(terms, key=lambda term: -term.top)
        so_far, rest = 0.0, sum(term.top for term in terms)
        partial = np.zeros(self.num_texts, np.float32)
        hits, scores, closed = np.zeros(0, np.int32), np.zeros(0, np.float32), False
        for term in terms:
            so_far, rest = so_far + term.top, rest - term.top
            if closed:
                term.add_to(scores, hits)
            else:
                fresh = term.texts[partial[term.texts] == 0]
                partial[term.texts] += term.weights()
                hits = np.concatenate([hits, fresh])
                if len(hits) <= limit or so_far <= rest:
                    continue
                scores = partial[hits]
            above = scores[scores > rest]
            if len(above) > limit:
                least = np.partition(above, -limit)[-limit] * _ROUNDING
                kept = scores + rest >= least
                hits, scores = hits[kept], scores[kept]
                if not closed and least > rest:
                    order = np.argsort(hits)
                    hits, scores, closed = hits[order], scores[order], True
        return hits if closed else np.sort(hits)

    def _find(self, term: bytes) -> int | None:
        place = bisect.bisect_left(range(len(self._term_ends)), term, key=self._term)
        found = place < len(self._term_ends) and self._term(place) == term
        return place if found else None

    def _term(self, index: int) -> bytes:
        start = self._term_ends[index - 1] if index else 0
        return self._term_bytes[start : self._term_ends[index]].tobytes()


def build_index(texts: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of a `SearchIndex`; texts are read one by one and not kept."""
    stem = _stemmer().stemWord
    term_numbers: dict[str, int] = {}  # stem → number, by first occurrence
    word_numbers: dict[str, int] = {}  # word → number of its stem
    numbers, counts = array("i"), array("i")  # one entry per posting, text by text
    sizes, lengths = array("i"), array("i")  # per text: postings, words
    for text in texts:
        words = tokens(text)
        for word in words:
            if word not in word_numbers:
                stemmed = stem(word)
                word_numbers[word] = term_numbers.setdefault(stemmed, len(term_numbers))
        counted = Counter(map(word_numbers.__getitem__, words))
        numbers.extend(counted.keys())
        counts.extend(counted.values())
        sizes.append(len(counted))
        lengths.append(len(words))
    terms = sorted((term.encode(errors="replace"), number) for term, number in term_numbers.items())
    return {
        "term_bytes": np.frombuffer(b"".join(term for term, _ in terms), np.uint8),
        "term_ends": np.cumsum([len(term) for term, _ in terms], dtype=np.int64),
        **_postings(
            np.array([number for _, number in terms], np.int64),
            *(np.frombuffer(column, np.int32) for column in (numbers, counts, sizes, lengths)),
        ),
    }


def _postings(
    term_order: np.ndarray,
    numbers: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
    lengths: np.ndarray,
) -> dict[str, np.ndarray]:
    """Postings sorted by term and, within a term, by text; see `build_index` for the columns."""
    num_texts, num_terms = len(sizes), len(term_order)
    ranks = np.empty(num_terms, np.int32)
    ranks[term_order] = np.arange(num_terms, dtype=np.int32)
    frequencies = np.bincount(ranks[numbers], minlength=num_terms)
    idf = np.log1p((num_texts - frequencies + 0.5) / (frequencies + 0.5)).astype(np.float32)
    mean_length = max(1.0, float(lengths.mean())) if num_texts else 1.0
    norms = (K1 * (1 - B + B * lengths / mean_length)).astype(np.float32)
    ends = np.cumsum(frequencies, dtype=np.int64)
    places = ends - frequencies  # of each term's next posting
    texts = np.empty(len(numbers), np.int32)
    weights = np.empty(len(numbers), np.float32)
    text_ends = np.cumsum(sizes, dtype=np.int64)
    # Block by block, so that a large catalogue needs little more memory than its postings.
    for start in range(0, len(numbers), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(numbers)))
        ranked = ranks[numbers[block]]
        order = np.argsort(ranked, kind="stable")
        ranked = ranked[order]
        found = np.bincount(ranked, minlength=num_terms)
        firsts = np.cumsum(found) - found
        target = places[ranked] + np.arange(len(ranked)) - firsts[ranked]
        owners = np.searchsorted(text_ends, order + start, side="right")
        tf = counts[block][order].astype(np.float32)
        texts[target] = owners
        weights[target] = idf[ranked] * tf / (tf + norms[owners])
        places += found
    return {
        "posting_ends": ends,
        "posting_texts": texts,
        "posting_weights": weights,
        "top_weights": np.maximum.reduceat(weights, ends - frequencies) if num_terms else weights,
        "num_texts": np.array([num_texts], np.int64),
    }


def _stemmer():
    try:
        import Stemmer
    except ImportError as error:
        raise ImportError(missing_package("PyStemmer")) from error
    return Stemmer.Stemmer("porter")


def missing_package(package: str) -> str:
    """What to say when a package of the extra is not installed."""
    return f"webshop: the package {package} is not installed; run pip install -e '.[webshop]'"
