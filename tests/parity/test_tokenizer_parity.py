"""Token ids against transformers' CLIPTokenizer, loaded from the folder that `save` wrote."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from tinyldm.data.tokenizer import END, START, Tokenizer

CAPTIONS = [
    "a photo of two cats, it's 1990!",
    "the cat's photo: the dog isn't there... they're late, we've left, i'm sure you'll say he'd",
    "«Déjà vu» — a café in Zürich, naïve façade",
    "ΟΔΥΣΣΕΥΣ και ο Οδυσσέας", "красный круг и синий круг", "一只红色的猫 一只蓝色的猫",
    "🎨 art 🎨 art!!! ???", "endoftext startoftext <| |>",
] * 3  # fmt: skip

# Every character that Python's Unicode knows. (Where it is newer than the tables of transformers, a
# letter here may be none there.)
ASSIGNED = [
    chr(code)
    for code in range(0x110000)
    if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
]
MARKS = [char for char in ASSIGNED if unicodedata.combining(char)]
NEWER = [
    "🎨", "👩‍🚀", "👍🏽", "🇹🇷", "ẞ", "Ა", "𞤀", "ꭰ", "Ꭰ", "\u2e2f", "〇", "꘠", "🄀", "𝟘",
]  # fmt: skip
SPECIAL = [
    START, END, "<|STARTOFTEXT|>?", "<|EndOfText|>", "<|EndOfText|>!", "<|endoftext", "oftext|>",
]  # fmt: skip
TRICKY = [
    *NEWER, *SPECIAL, "İ", "I", "ı", "i̇", "Σ", "σ", "ς", "ΑΣ", "ǅ", "ﬀ", "K", "Å",
    "e\u0301", "\u0345",
    "가", "\u1100\u1161\u11a8", "\u0323\u0307", "٣", "೬", "Ⅳ", "½", "²", "\u0085", "\u00a0",
    "\u00ad",
    "\u1680", "\u180e", "\u2028", "\u2029", "\u200b", "\u200d", "\u202f", "\u3000", "\ufeff",
    "\x00",
    "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x7f", " ", "\t", "\r\n", "'", "'S",
    "'re", "'ée", "'LL",
    "’s", "''", "_", "</w>", "!", "\u037e",
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.text(alphabet=st.sampled_from(ASSIGNED), max_size=8),
        st.text(alphabet=st.sampled_from(MARKS), max_size=4),
        st.sampled_from(TRICKY),
        st.sampled_from(" ".join(CAPTIONS).split()),
        st.text(alphabet="abcdefst'lrvm<|> .,!1 ", max_size=8),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module", params=[END, "!", "CLIP's own"])
def pair(request, tmp_path_factory):
    """Ours and transformers': small, with both paddings of published checkpoints, and CLIP's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "CLIP's own":
        ours = Tokenizer.clip()
    else:
        ours = Tokenizer.train(CAPTIONS, vocab_size=700, max_length=12)
        ours = Tokenizer(ours.vocab, ours.merges, ours.max_length, pad_token=request.param)
    ours.save(folder)
    return ours, CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def unlimited(pair):
    """Ours, for whole captions: the short rows cut most of them."""
    ours, _ = pair
    return Tokenizer(ours.vocab, ours.merges, 10_000, ours.pad_token)


@pytest.mark.filterwarnings("ignore:caption cut")
@settings(max_examples=5_000, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_transformers(pair, unlimited, text):
    ours, theirs = pair
    expected = theirs(text, padding="max_length", truncation=True)["input_ids"]
    assert ours(text)[0].tolist() == expected

    ids = unlimited(text)[0]
    expected = theirs(text)["input_ids"]
    assert ids[: len(expected)].tolist() == expected
    assert set(ids[len(expected) :]) <= {ours.pad_id}


def test_every_character(pair, unlimited):
    _, theirs = pair
    for start in range(0, len(ASSIGNED), 8):
        text = "a".join(ASSIGNED[start : start + 8])
        expected = theirs(text)["input_ids"]
        assert unlimited(text)[0, : len(expected)].tolist() == expected


@pytest.mark.parametrize("files", ["vocab.json and merges.txt", "tokenizer.json"])
def test_loads_what_transformers_writes(pair, tmp_path, files):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    if files != "tokenizer.json":
        ours.save(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab, loaded.merges) == (ours.vocab, ours.merges)
    assert (loaded.max_length, loaded.pad_id) == (ours.max_length, ours.pad_id)


def test_special_tokens_map_overrides_the_padding_token(pair, tmp_path):
    ours, _ = pair
    ours.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "?"}')
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    expected = theirs("hm? yes", padding="max_length")["input_ids"]
    assert Tokenizer.load(tmp_path)("hm? yes")[0].tolist() == expected


CAT = "<cat-toy>"
WITH_ADDED = [
    f"a photo of a {CAT}", f"{CAT}{CAT} {CAT}!", f"A {CAT.upper()} on it", f"an{CAT}in a word", CAT,
    "<cat-toy", f"{CAT}2 and <dog> and <DOG>", "", f"  {CAT}  ", f"<<cat-toy>>{CAT}é",
]  # fmt: skip


@pytest.mark.parametrize("files", ["tokenizer.json", "written here", "old"])
def test_tokens_added_by_textual_inversion(pair, tmp_path, files):
    ours, _ = pair
    ours.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens([CAT, CAT + "2"])
    theirs.add_tokens(["<dog>"], special_tokens=True)
    if files == "old":  # a file of names and ids beside vocab.json and merges.txt
        names = (CAT, CAT + "2", "<dog>")
        added = {name: len(ours) + i for i, name in enumerate(names)}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    else:
        for file in tmp_path.glob("*"):
            file.unlink()
        theirs.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    if files == "written here":
        for file in tmp_path.glob("*"):
            file.unlink()
        loaded.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        assert again.content == loaded.content == Tokenizer(**loaded.content).content
        theirs = CLIPTokenizer.from_pretrained(tmp_path)
    unlimited = Tokenizer(**loaded.content | {"max_length": 100})
    for text in WITH_ADDED:
        if files == "old" and "DOG" in text:
            continue  # the old file does not say that one of them is special
        expected = theirs(text)["input_ids"]
        assert unlimited(text)[0, : len(expected)].tolist() == expected, text
