"""Token ids: hand examples, round trips, training, and what is said about bad files."""

import json
import os
import unicodedata
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyldm.data.byte_pairs import merge
from tinyldm.data.tokenizer import END, START, Tokenizer

CAPTIONS = ["a red circle", "a blue square", "two red squares on blue", "a small blue circle"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, vocab_size=600, max_length=16)


def tokens_of(tokenizer, text):
    """The tokens of a caption by name, without start, end and padding."""
    names = {i: token for token, i in tokenizer.vocab.items()}
    ids = tokenizer(text)[0].tolist()
    return [names[i] for i in ids[1 : ids.index(tokenizer.end_id, 1)]]


def plain(text):
    """What decoding leaves of a text: normal form, lower case, no white space."""
    lower = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
    return "".join(lower.split())


def test_a_row_is_start_caption_end_padding(tokenizer):
    rows = tokenizer(["a red circle", ""])
    assert rows.shape == (2, tokenizer.max_length) and rows.dtype == np.int64
    words = [tokenizer.vocab[word] for word in ("a</w>", "red</w>", "circle</w>")]
    start, end, pad = tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
    assert rows[0].tolist() == [start, *words, end, *[pad] * 11]
    assert rows[1].tolist() == [start, end, *[pad] * 14]
    np.testing.assert_array_equal(tokenizer("a red circle"), rows[:1])
    assert tokenizer([]).shape == (0, tokenizer.max_length)


def test_a_long_caption_is_cut_before_its_end_token(tokenizer):
    short = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=4)
    with pytest.warns(UserWarning, match=r"^caption cut at 2 tokens, without 'circle'$") as caught:
        row = short("a red circle")[0]
    assert caught[0].filename == __file__
    assert row.tolist() == [*tokenizer("a red")[0, :3], short.end_id]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short("a red")


def test_merges_are_applied_in_the_order_learned():
    base = Tokenizer.train([], vocab_size=514)
    assert len(base) == 514 and base.merges == []
    assert tokens_of(base, "abc") == ["a", "b", "c</w>"]

    def with_merges(*merges):
        vocab = dict(base.vocab)
        for pair in merges:
            vocab.setdefault("".join(pair), len(vocab))
        return Tokenizer(vocab, list(merges))

    # Both pairs are there; the one learned first takes the b.
    assert tokens_of(with_merges(("b", "c</w>"), ("a", "b")), "abc") == ["a", "bc</w>"]
    assert tokens_of(with_merges(("a", "b"), ("b", "c</w>")), "abc") == ["ab", "c</w>"]
    # Of equal pairs the leftmost goes first, and a new token may be part of a later pair.
    assert tokens_of(with_merges(("a", "a")), "aaaa") == ["aa", "a", "a</w>"]
    assert tokens_of(with_merges(("a", "a"), ("aa", "a")), "aaaa") == ["aaa", "a</w>"]
    # A pair inside a piece is not the pair that ends it.
    assert tokens_of(with_merges(("a", "b</w>")), "ab abb") == ["ab</w>", "a", "b", "b</w>"]


def merged_by_looking_at_all_pairs(symbols, ranks):
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[at] not in ranks:
            break
        symbols = [*symbols[:at], "".join(pairs[at]), *symbols[at + 2 :]]
    return symbols


@given(text=st.text("abc", min_size=1, max_size=40), data=st.data())
def test_merging_with_a_heap_is_merging_the_first_pair_of_all(text, data):
    known, ranks = ["a", "b", "c"], {}
    for _ in range(data.draw(st.integers(0, 12))):
        pair = data.draw(st.sampled_from(known)), data.draw(st.sampled_from(known))
        ranks.setdefault(pair, len(ranks))
        known.append("".join(pair))
    assert merge(list(text), ranks) == merged_by_looking_at_all_pairs(list(text), ranks)


def test_a_long_word_takes_about_as_long_as_many_short_ones():
    """Steps are counted, not seconds: look-ups of pairs in the table of merges."""

    class Counted(dict):
        looks = 0

        def __contains__(self, pair):
            Counted.looks += 1
            return super().__contains__(pair)

    merges = Tokenizer.clip()._ranks
    word = [chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 50_000)]
    merge(word, Counted(merges))
    assert Counted.looks < 4 * len(word)


def test_added_tokens_are_taken_whole(tokenizer):
    vocab = tokenizer.vocab | {"<cat>": len(tokenizer), "<Dog>": len(tokenizer) + 1}
    ours = Tokenizer(vocab, tokenizer.merges, 16, added={"<cat>": False, "<Dog>": True})
    cat, dog = len(tokenizer), len(tokenizer) + 1
    plain = [i for i in tokenizer("a red circle")[0, 1:4]]
    assert ours("a red <CAT>circle<Dog>")[0, 1:7].tolist() == [
        *plain[:2],
        cat,
        plain[2],
        dog,
        ours.end_id,
    ]
    assert cat not in ours("<c at> <dog>")[0] and dog not in ours("<dog>")[0]
    assert ours.decode(ours("a <cat> red")[0]) == "a <cat> red"


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_list_of_merges_that_is_cut_off_is_said(tokenizer, tmp_path, kept):
    tokenizer.save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[: 1 + kept]))
    lacking = len(tokenizer.merges) - kept
    with pytest.warns(
        UserWarning, match=f"{lacking} of {len(tokenizer)} tokens come from no merge"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"content": "<cat>", "id": 9000}, "the ids must be"),
        ({"content": "a</w>", "id": 3}, "the added token 'a</w>' has ids"),
        ({"content": "<cat>", "id": 600, "lstrip": True}, "'<cat>': lstrip is not implemented"),
    ],
)
def test_added_tokens_that_cannot_be(tokenizer, tmp_path, entry, message):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(entry.pop("id")): entry}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_training_joins_the_most_frequent_pair_then_the_first_in_order():
    # a b</w> twice, b c</w> three times, x y</w> three times, p q</w> once
    trained = Tokenizer.train(["ab bc xy", "ab bc xy", "bc xy pq"])
    assert trained.merges == [("b", "c</w>"), ("x", "y</w>"), ("a", "b</w>")]
    assert trained.vocab["bc</w>"] == 512
    assert (trained.start_id, trained.end_id) == (len(trained) - 2, len(trained) - 1) == (515, 516)
    assert trained.pad_id == trained.end_id


@settings(deadline=None)
@given(words=st.lists(st.text("ab", min_size=1, max_size=8), max_size=8))
def test_training_agrees_with_counting_afresh_before_eachmerge(words):
    trained = Tokenizer.train([" ".join(words)])
    merges, split = [], [[*word[:-1], word[-1] + "</w>"] for word in words]
    while True:
        pairs = [pair for word in split for pair in pairwise(word)]
        best = min(pairs, key=lambda pair: (-pairs.count(pair), pair), default=None)
        if best is None or pairs.count(best) < 2:
            break
        merges.append(best)
        for word in split:
            for i in range(len(word) - 1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    assert trained.merges == merges


def test_training_is_deterministic_and_keeps_to_its_size():
    one, other = Tokenizer.train(CAPTIONS, 530), Tokenizer.train(list(reversed(CAPTIONS)), 530)
    assert len(one) == 530
    assert (one.vocab, one.merges) == (other.vocab, other.merges)
    assert sorted(one.vocab.values()) == list(range(530))
    with pytest.raises(ValueError, match="vocab_size: expected 514 or more, found 513"):
        Tokenizer.train(CAPTIONS, vocab_size=513)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_decoding_gives_the_text_back(text):
    tokenizer = Tokenizer.train([text, text], max_length=130)
    assert plain(tokenizer.decode(tokenizer(text)[0])) == plain(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It's 1990!", ["it", "'s", "1", "9", "9", "0", "!"]),
        ("they're we'll i'd 'ée", ["they", "'re", "we", "'ll", "i", "'d", "'", "ée"]),
        ("red,  blue\n\tsquare...", ["red", ",", "blue", "square", "..."]),
        ("no\u00a0break\u2028line\u0085next", ["no", "break", "line", "next"]),
        ("unit\x1fseparator", ["unit", "\x1f", "separator"]),
        ("Cafe\u0301 ½ ٣", ["café", "½", "٣"]),
        ("ΟΔΥΣΣΕΥΣ", ["οδυσσευσ"]),
        ("İ", ["i", "\u0307"]),
        ("红色 🎨🎨", ["红色", "🎨🎨"]),
        ("<|ENDOFTEXT|>!", ["<|", "endoftext", "|>", "!"]),
        ("<|StartOfText|>!", ["<|", "startoftext", "|>", "!"]),
        ("!<|ENDOFTEXT|>!", ["!<|", "endoftext", "|>!"]),
    ],
)
def test_pieces(text, pieces):
    tokenizer = Tokenizer.train([text] * 2, max_length=77)  # two of each: every piece is a token
    assert tokenizer.decode(tokenizer(text)[0]).split(" ") == pieces


def test_special_tokens_in_a_caption(tokenizer):
    assert tokens_of(tokenizer, f"red{START}blue") == ["red</w>", START, "blue</w>"]
    row = tokenizer(f"red{END}blue")[0, :5].tolist()
    red, blue = tokenizer.vocab["red</w>"], tokenizer.vocab["blue</w>"]
    assert row == [tokenizer.start_id, red, tokenizer.end_id, blue, tokenizer.end_id]
    assert tokenizer.decode(row) == "red blue"

    padded = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=6, pad_token="!")
    assert padded("red!")[0].tolist() == [padded.start_id, red, 0, padded.end_id, 0, 0]
    assert tokens_of(tokenizer, "red!") == ["red</w>", "!</w>"]
    # Where one special token begins another, the longer is meant.
    padded = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=6, pad_token="<")
    assert tokens_of(padded, f"<{START}red") == ["<", START, "red</w>"]


def test_a_missing_byte_becomes_the_end_token():
    small = Tokenizer({"a</w>": 0, START: 1, END: 2}, [], max_length=5)
    assert small("a b")[0].tolist() == [1, 0, 2, 2, 2]


def test_decoding_refuses_foreign_ids(tokenizer):
    for i in (-1, len(tokenizer)):
        with pytest.raises(ValueError, match=f"token id {i} is outside the vocabulary, 0 .. "):
            tokenizer.decode([i])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": {START: 0, END: 2}}, "vocab: the ids must be 0 .. 1"),
        ({"vocab": {START: 0}}, "vocab: '<|endoftext|>' is not among the 1 tokens"),
        ({"pad_token": "<pad>"}, "vocab: '<pad>' is not among the 2 tokens"),
        ({"merges": [("a", "b")]}, "merges: expected two tokens that vocab holds"),
        ({"max_length": 1}, "max_length: expected 2 (start and end) or more, found 1"),
    ],
)
def test_constructor_checks(changes, message):
    with pytest.raises(ValueError) as caught:
        Tokenizer(**{"vocab": {START: 0, END: 1}, "merges": []} | changes)
    assert message in str(caught.value)


def same(one, other):
    names = ("vocab", "merges", "max_length", "pad_token", "start_id", "end_id", "pad_id")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_save_and_load(tokenizer, tmp_path):
    other = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=20, pad_token="!")
    other.save(tmp_path / "a" / "tokenizer")
    assert same(Tokenizer.load(tmp_path / "a" / "tokenizer"), other)
    tokenizer.save(tmp_path / "a" / "tokenizer")  # over the first
    assert same(Tokenizer.load(str(tmp_path / "a" / "tokenizer")), tokenizer)
    names = sorted(path.name for path in (tmp_path / "a" / "tokenizer").iterdir())
    assert names == ["merges.txt", "tokenizer_config.json", "vocab.json"]


def test_load_without_version_line_or_configuration(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges.split("\n", 1)[1], encoding="utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = Tokenizer.load(tmp_path)
    assert loaded.merges == tokenizer.merges
    assert (loaded.max_length, loaded.pad_token) == (77, END)


@pytest.mark.parametrize(
    ("config", "map_", "expected"),
    [
        ({"model_max_length": 10**30}, {}, (77, END)),
        ({"model_max_length": 1e30, "pad_token": None}, {}, (77, END)),
        ({"model_max_length": 9, "pad_token": {"content": "!", "lstrip": False}}, {}, (9, "!")),
        ({"pad_token": END}, {"pad_token": "!"}, (77, "!")),
        ({"pad_token": END, "added_tokens_decoder": {}}, {"pad_token": "!"}, (77, END)),
    ],
)
def test_load_reads_length_and_padding(tokenizer, tmp_path, config, map_, expected):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.max_length, loaded.pad_token) == expected


@pytest.mark.parametrize("form", [list, " ".join])
def test_load_tokenizer_json_alone(tokenizer, tmp_path, form):
    model = {"vocab": tokenizer.vocab, "merges": [form(pair) for pair in tokenizer.merges]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    assert same(Tokenizer.load(tmp_path), tokenizer)


@pytest.mark.parametrize("names", [[], ["vocab.json"], ["merges.txt", "model.safetensors"]])
def test_load_names_what_is_missing(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    for folder in (tmp_path, tmp_path / "missing"):
        found = (names if folder == tmp_path else []) or "nothing"
        with pytest.raises(FileNotFoundError) as caught:
            Tokenizer.load(folder)
        assert str(caught.value).startswith(f"{folder}: expected vocab.json and merges.txt, or ")
        assert f"found {found}; " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b'{"a": 0,', "vocab.json: not valid JSON: "),
        ("vocab.json", b"\xff\xfe", "vocab.json: not valid JSON: 'utf-8' codec"),
        ("vocab.json", b"[1, 2]", "vocab.json: expected a JSON object, found list"),
        ("vocab.json", b'{"<|startoftext|>": 1}', "vocab: the ids must be 0 .. 0, each once"),
        ("vocab.json", b"{}", "vocab: '<|startoftext|>' is not among the 0 tokens"),
        ("vocab.json", b'{"a": 0, "b": "1"}', "not the files of one CLIP tokenizer"),
        ("merges.txt", b"#version: 0.2\na b c\n", "found 'a b c'; take both from the same"),
        ("merges.txt", b"a b\n\n", "found 'a b'; take both from the same tokenizer"),
        ("merges.txt", b"\xff", "not the files of one CLIP tokenizer"),
        ("tokenizer_config.json", b"", "tokenizer_config.json: not valid JSON: "),
        ("tokenizer_config.json", b'{"pad_token": "<pad>"}', "vocab: '<pad>' is not among the"),
        ("tokenizer_config.json", b'{"pad_token": {"x": 1}}', "vocab: None is not among the"),
        ("tokenizer_config.json", b'{"model_max_length": 0}', "max_length: expected 2"),
        ("tokenizer_config.json", b'{"model_max_length": "16"}', "an integer, found '16'"),
        ("tokenizer_config.json", b'{"model_max_length": 16.5}', "an integer, found 16.5"),
    ],
)
def test_load_says_what_is_malformed(tokenizer, tmp_path, name, content, message):
    tokenizer.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: not the files of one CLIP tokenizer (")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "tokenizer_config.json"])
def test_load_reads_no_pipe(tokenizer, tmp_path, name):
    tokenizer.save(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"not the files of one CLIP tokenizer .*{name}") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"model": []}', '{"model": {"vocab": [], "merges": []}}', '{"model": {"merges": 3}}'],
)
def test_load_says_that_tokenizer_json_is_malformed(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"^.*: not the files of one CLIP tokenizer \(.*\); fetch"):
        Tokenizer.load(tmp_path)


def test_words_that_need_several_tokens():
    tokenizer = Tokenizer.train(["a red circle"] * 2, vocab_size=600)
    assert tokenizer.in_parts("A red circle, a RED square, two squares 7") == [
        "square", "two", "squares",
    ]  # fmt: skip
    assert tokenizer.in_parts("a red circle") == []
