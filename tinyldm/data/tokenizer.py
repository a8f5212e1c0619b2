"""Byte-pair encoding as CLIP does it: captions in, rows of token ids out.

A caption is normalised and split into pieces (words, digits, punctuation). Each piece becomes the
symbols of its UTF-8 bytes, and a learned list of merges joins neighbouring symbols into tokens.
Every byte is itself a token, so no caption is ever out of vocabulary.
"""

import gzip
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from tinyldm.data.byte_pairs import (
    BYTES,
    SYMBOLS,
    WORD_END,
    merge,
    normalised,
    pieces,
    symbols_of,
)
from tinyldm.files import is_regular, read_json, replacing, shown

START, END = "<|startoftext|>", "<|endoftext|>"
LONGEST_NAMED = 200  # characters of a text that a warning repeats


def _whole(tokens):
    """Compile an expression that splits text at these tokens, the longest first; None for none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if tokens else None


def _add_tokens(vocab, listed):
    """Put listed tokens that `vocab` lacks into it, in order → {token: only as it is written}."""
    added = {}
    for entry in sorted(listed, key=lambda entry: entry["id"]):
        token = entry["content"]
        if not token:
            raise ValueError(f"the added token {entry['id']} is empty")
        if vocab.get(token, entry["id"]) != entry["id"]:
            raise ValueError(f"the added token {token!r} has ids {vocab[token]} and {entry['id']}")
        if token in vocab and token not in added:
            continue  # such as the start, the end, and the padding
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if entry.get(flag)]
        if flags:
            raise ValueError(f"the added token {token!r}: {flags[0]} is not implemented")
        vocab[token] = entry["id"]
        added.setdefault(token, not entry.get("normalized", True))
    return added


class CaptionCut(UserWarning):
    """A caption has more tokens than a row holds."""


class Tokenizer:
    """Turns captions into fixed-length rows of token ids, with the same ids as CLIP's own.

    Args:
        vocab: the id of every token; the ids are 0 .. len(vocab) - 1.
        merges: the pairs of tokens to join, the first learned first.
        max_length: tokens in a row, start and end token included.
        pad_token: the token of `vocab` that fills short rows. Like the start and end token, it is
            taken whole where a caption spells it out.
        added: tokens of `vocab` that were added to a trained tokenizer, as by textual inversion
            (Gal et al. 2022), and whether they count only as they are written, not in other
            capitals. They are taken whole too.

    Attributes:
        start_id, end_id, pad_id: ids of the start, end and padding token. The end token also
            stands for a byte that `vocab` lacks.

    Raises:
        ValueError: the ids leave gaps, a special token or a merge is not in `vocab`, or a row
            has no room for the start and end token.
    """

    FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")  # that `save` writes

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        max_length: int = 77,
        pad_token: str = END,
        added: Mapping[str, bool] | None = None,
    ):
        added = dict(added or {})
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"vocab: the ids must be 0 .. {len(vocab) - 1}, each once")
        for token in (START, END, pad_token, *added):
            if token not in vocab:
                raise ValueError(f"vocab: {token!r} is not among the {len(vocab)} tokens")
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
                raise ValueError(
                    f"merges: expected two tokens that vocab holds, as well as their join, "
                    f"found {' '.join(pair)!r}; take both from the same tokenizer"
                )
        if max_length < 2:
            raise ValueError(f"max_length: expected 2 (start and end) or more, found {max_length}")
        self.vocab, self.merges = vocab, merges
        self.max_length, self.pad_token, self.added = max_length, pad_token, added
        self.start_id, self.end_id, self.pad_id = vocab[START], vocab[END], vocab[pad_token]
        self._tokens = sorted(vocab, key=vocab.__getitem__)
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        exact = {token for token, as_written in added.items() if as_written}
        self._special = _whole({START, END, pad_token} | exact)
        loose = added.keys() - exact
        self._id_of_added = {normalised(token): vocab[token] for token in loose}
        self._added = _whole(self._id_of_added)
        self._ids_of_piece = {}

    def __len__(self) -> int:
        return len(self.vocab)

    @property
    def content(self) -> dict:
        """Return the constructor's arguments, from which it can be rebuilt."""
        names = ["vocab", "merges", "max_length", "pad_token", *(["added"] if self.added else [])]
        return {name: getattr(self, name) for name in names}

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Encode a list of captions → token ids, int64 (n, max_length); a string is a list of one.

        Each row is the start token, the caption, the end token, then padding. A caption that is
        too long is cut before the end token, with a warning that names the text left out.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = np.full((len(texts), self.max_length), self.pad_id, dtype=np.int64)
        room = self.max_length - 2
        for row, text in zip(rows, texts, strict=True):
            ids = self._encode(text)
            if len(ids) > room:
                lost = self.decode(ids[room:])
                if len(lost) > LONGEST_NAMED:
                    lost = f"{lost[: LONGEST_NAMED // 2]} … {lost[-LONGEST_NAMED // 2 :]}"
                warnings.warn(
                    f"caption cut at {room} tokens, without {lost!r}", CaptionCut, stacklevel=2
                )
            ids = [self.start_id, *ids[:room], self.end_id]
            row[: len(ids)] = ids
        return rows

    def _encode(self, text):
        """Return the ids of the whole caption, without start and end token."""
        ids = []
        for i, part in enumerate(self._special.split(text)):
            if i % 2:  # plain text and special tokens take turns
                ids.append(self.vocab[part])
                continue
            part = normalised(part)
            for j, plain in enumerate(self._added.split(part) if self._added else [part]):
                ids += [self._id_of_added[plain]] if j % 2 else self._encode_plain(plain)
        return ids

    def _encode_plain(self, text):
        ids = []
        for piece in pieces(text):
            if piece not in self._ids_of_piece:  # captions repeat their words: merge each once
                tokens = merge(symbols_of(piece), self._ranks)
                self._ids_of_piece[piece] = [self.vocab.get(t, self.end_id) for t in tokens]
            ids += self._ids_of_piece[piece]
        return ids

    def in_parts(self, text: str) -> list[str]:
        """Return the words of a text that take several tokens, each word once."""
        found = dict.fromkeys(pieces(normalised(text)))
        return [piece for piece in found if len(self._encode_plain(piece)) > 1]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode one row of ids to text, for people to read.

        It is in lower case, with a space after each piece, without special tokens, and with a
        replacement character where the ids cut a character in two.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        data = bytearray()
        for i in map(int, ids):
            if not 0 <= i < len(self):
                raise ValueError(f"token id {i} is outside the vocabulary, 0 .. {len(self) - 1}")
            if i not in (self.start_id, self.end_id, self.pad_id):
                token = self._tokens[i]
                if token in self.added:
                    data += f"{token} ".encode()
                    continue
                data += bytes(BYTES[symbol] for symbol in token.removesuffix(WORD_END))
                data += b" " * token.endswith(WORD_END)
        return data.decode("utf-8", errors="replace").strip()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 1024, max_length: int = 16) -> Self:
        """Learn merges from captions: join the most frequent pair of neighbours, again and again.

        Sennrich et al. 2016, algorithm 1, over the bytes of UTF-8 (Radford et al. 2019).
        Of equally frequent pairs, the first in code point order is joined, so equal captions
        give equal tokenizers. Ends at `vocab_size` tokens, or once no pair occurs twice.

        Raises:
            ValueError: `vocab_size` does not hold the 512 byte symbols and 2 special tokens.
        """
        if vocab_size < 514:
            raise ValueError(f"vocab_size: expected 514 or more, found {vocab_size}")
        times = Counter(piece for text in texts for piece in pieces(normalised(text)))
        words = {piece: symbols_of(piece) for piece in times}
        tally = Counter()  # pair -> how often it occurs
        homes = defaultdict(set)  # pair -> the words that have had it: no others need a revisit

        def count(word, sign):
            for pair in pairwise(words[word]):
                tally[pair] += sign * times[word]
                homes[pair].add(word)

        for word in words:
            count(word, +1)
        tokens = [*SYMBOLS.values(), *(symbol + WORD_END for symbol in SYMBOLS.values())]
        vocab, merges = {token: i for i, token in enumerate(tokens)}, []
        while len(vocab) < vocab_size - 2 and (most := max(tally.values(), default=0)) > 1:
            best = min(pair for pair, number in tally.items() if number == most)
            merges.append(best)
            vocab["".join(best)] = len(vocab)
            for word in homes.pop(best):
                count(word, -1)
                words[word] = merge(words[word], {best: 0})
                count(word, +1)
        vocab |= {START: len(vocab), END: len(vocab) + 1}
        return cls(vocab, merges, max_length)

    @classmethod
    def clip(cls, pad_token: str = END) -> Self:
        """Load CLIP's own tokenizer of 49,408 tokens, Stable Diffusion's (Radford et al. 2021)."""
        file = Path(__file__).with_name("clip_merges.txt.gz")
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines]
        symbols = [*SYMBOLS.values()]
        tokens = [*symbols, *(s + WORD_END for s in symbols), *map("".join, merges), START, END]
        return cls({token: i for i, token in enumerate(tokens)}, merges, 77, pad_token)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the tokenizer folder of a checkpoint, as `save` or transformers writes it.

        Vocabulary and merges come from vocab.json and merges.txt or, without those, from
        tokenizer.json; the length (77 where none is stated) and the padding token come from
        tokenizer_config.json and the older special_tokens_map.json, where there are any.

        Raises:
            FileNotFoundError: the folder holds no vocabulary.
            ValueError: a file is malformed, or the files do not belong together.
        """
        folder = Path(folder)
        names = {path.name for path in folder.glob("*")}
        in_two_files = {"vocab.json", "merges.txt"} <= names
        if not in_two_files and "tokenizer.json" not in names:
            raise FileNotFoundError(
                f"{folder}: expected vocab.json and merges.txt, or tokenizer.json, found "
                f"{sorted(names) or 'nothing'}; name the tokenizer folder of a checkpoint"
            )
        try:
            if in_two_files:
                vocab = read_json(folder / "vocab.json")
                if not is_regular(folder / "merges.txt"):
                    raise ValueError("merges.txt is a folder, device or pipe")
                lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
                merges = lines[1:] if lines and lines[0].startswith("#version") else lines
            else:
                model = read_json(folder / "tokenizer.json").get("model", {})
                vocab, merges = model.get("vocab", {}), model.get("merges", [])
            merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]

            config, listed = {}, []
            if "tokenizer.json" in names:
                listed += read_json(folder / "tokenizer.json").get("added_tokens", [])
            if "added_tokens.json" in names:
                by_name = read_json(folder / "added_tokens.json")
                listed += [{"content": token, "id": i} for token, i in by_name.items()]
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                if name in names and "added_tokens_decoder" not in config:  # else the map is old
                    config |= read_json(folder / name)
            max_length = config.get("model_max_length")
            huge = isinstance(max_length, (int, float)) and max_length > 1_000_000
            if max_length is None or huge:  # which stands for no limit
                max_length = 77
            elif type(max_length) is not int:
                raise ValueError(f"model_max_length: expected an integer, found {max_length!r:.60}")
            pad = config.get("pad_token") or END
            pad = pad.get("content") if isinstance(pad, dict) else pad
            by_id = config.get("added_tokens_decoder") or {}
            # These go first: the older files do not say whether capitals count.
            listed = [entry | {"id": int(i)} for i, entry in by_id.items()] + listed
            added = _add_tokens(vocab, listed)
            tokenizer = cls(vocab, merges, max_length, pad, added)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: not the files of one CLIP tokenizer ({error}); fetch them again"
            ) from error
        if lacking := len(vocab.keys() - tokenizer._made()):
            warnings.warn(
                f"{shown(folder)}: {lacking} of {len(vocab)} tokens come from no merge, and will "
                "not occur; is the list of merges cut off?",
                stacklevel=2,
            )
        return tokenizer

    def _made(self):
        """Return all tokens that can occur."""
        made = {*map("".join, self.merges), *SYMBOLS.values(), *self.added}
        made |= {symbol + WORD_END for symbol in SYMBOLS.values()}
        return made | {START, END, self.pad_token}

    def save(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, which transformers reads too."""
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": self.pad_token,
        }
        if self.added:
            config["added_tokens_decoder"] = {
                str(self.vocab[token]): {
                    "content": token, "lstrip": False, "normalized": not exact, "rstrip": False,
                    "single_word": False, "special": exact,
                }
                for token, exact in self.added.items()
            }  # fmt: skip
        merges = ["#version: 0.2", *map(" ".join, self.merges)]
        vocab = {token: i for token, i in self.vocab.items() if token not in self.added}
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "\n".join(merges) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, text in files.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
