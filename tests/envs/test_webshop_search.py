"""The search index: against bm25s, and against a slow search."""

import math
import random
from collections import Counter
from itertools import pairwise

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.envs import webshop_search
from w2sjax.envs.webshop_search import K1, B, SearchIndex, _stemmer, build_index, tokens

WORDS = ("red", "blue", "shirt", "shirts", "lamp", "lamps", "running", "run", "organic", "tea")
WORDS += ("cotton", "usb", "port", "x1", "3.5")


def texts_of(seed, count=200):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def plain_scores(arrays, query):
    """Every text's score: all postings of the query's words, added one after the other."""
    terms = [
        bytes(arrays["term_bytes"][start:end]).decode(errors="replace")
        for start, end in pairwise([0, *arrays["term_ends"]])
    ]
    scores = np.zeros(arrays["num_texts"][0], np.float32)
    counted = Counter(map(_stemmer().stemWord, tokens(query)))
    for stem, count in counted.items():
        if stem in terms:
            term = terms.index(stem)
            postings = slice(*[0, *arrays["posting_ends"]][term : term + 2])
            scores[arrays["posting_texts"][postings]] += count * arrays["posting_weights"][postings]
    return scores


def test_scores_are_those_of_bm25s():
    texts = texts_of(0)
    stem = _stemmer().stemWord
    stems = [list(map(stem, tokens(text))) for text in texts]
    peer = bm25s.BM25(method="lucene", k1=K1, b=B)
    peer.index(stems, show_progress=False)
    arrays = build_index(texts)
    for query in ("red shirt", "lamps", "running tea usb", "3.5", "x1 x1 organic"):
        ours = plain_scores(arrays, query)
        words = [word for word in map(stem, tokens(query)) if word in peer.vocab_dict]
        np.testing.assert_allclose(ours, peer.get_scores(words), rtol=1e-5, atol=1e-6)


def test_hits_are_those_of_the_formula():
    texts = [*texts_of(1, 60), "nothing else"]
    arrays = build_index(texts)
    stem = _stemmer().stemWord
    documents = [[stem(word) for word in tokens(text)] for text in texts]
    mean = sum(map(len, documents)) / len(documents)

    def slow(query, document):
        total = 0.0
        for word in map(stem, tokens(query)):
            df = sum(word in other for other in documents)
            tf = document.count(word)
            if tf:
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                total += idf * tf / (tf + K1 * (1 - B + B * len(document) / mean))
        return total

    for query in ("red shirt", "usb port lamp", "organic organic tea"):
        expected = [slow(query, document) for document in documents]
        np.testing.assert_allclose(plain_scores(arrays, query), expected, rtol=1e-5)
        hits = SearchIndex(arrays).search(query, 10)
        assert len(hits) == 10
        assert [expected[row] for row in hits] == pytest.approx(sorted(expected)[::-1][:10])


@pytest.mark.parametrize("seed", range(4))
def test_leaving_out_what_cannot_be_among_the_best_changes_nothing(seed):
    """Words as frequent as in speech: rare ones first, common ones looked up for few texts."""
    rng = random.Random(seed)
    words = [f"word{index}" for index in range(400)]
    chances = [1 / (index + 1) for index in range(400)]
    texts = [" ".join(rng.choices(words, chances, k=rng.randint(1, 40))) for _ in range(1500)]
    arrays = build_index(texts)
    index = SearchIndex(arrays)
    for number in range(60):
        query = " ".join(rng.choices(words, chances if number % 2 else None, k=rng.randint(1, 9)))
        scores = plain_scores(arrays, query)
        best = [row for row in np.argsort(-scores, kind="stable").tolist() if scores[row] > 0]
        for limit in (1, 7, 50, 5000):
            assert index.search(query, limit) == tuple(best[:limit]), query


def test_rare_words_leave_few_texts_to_look_at():
    texts = [f"common {'rare' if row % 100 == 0 else 'other'} thing{row}" for row in range(3000)]
    index = SearchIndex(build_index(texts))
    terms = index._query_terms("common rare thing100")
    assert [len(term.texts) for term in terms] == [3000, 30, 1]
    assert len(index._hopeful(terms, 10)) <= 30


def test_blocks_do_not_matter(monkeypatch):
    whole = build_index(texts_of(2))
    monkeypatch.setattr(webshop_search, "_BLOCK", 7)
    for name, array in build_index(texts_of(2)).items():
        np.testing.assert_array_equal(array, whole[name])


def test_equals_come_in_their_order_and_what_does_not_match_does_not_come():
    index = SearchIndex(build_index(["tea", "lamp", "tea", "tea", "tea cup"]))
    assert index.search("teas", 2) == (0, 2)
    assert index.search("teas", 9) == (0, 2, 3, 4)
    assert index.search("the", 9) == index.search("sofa", 9) == index.search("", 9) == ()


def test_words():
    assert tokens("The D.O.N. Acme's USB-port, 3.5 mm’s don't") == [
        "d.o.n", "acme", "usb", "port", "3.5", "mm", "don't"
    ]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=6), st.text(max_size=40))
def test_any_text_can_be_indexed_and_searched(texts, query):
    arrays = build_index(texts)
    index = SearchIndex(arrays)
    assert len(index.search(query, 3)) == min(3, np.count_nonzero(plain_scores(arrays, query)))
    for row, text in enumerate(texts):
        assert (row in index.search(text, len(texts))) == bool(tokens(text))
