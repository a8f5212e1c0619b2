"""Byte-pair encoding as CLIP does it: captions in, rows of token ids out.

A caption is normalised and split into pieces (words, digits, punctuation). Each piece becomes the
symbols of its UTF-8 bytes, and a learned list of merges joins neighbouring symbols into tokens.
Every byte is itself a token, so no caption is ever out of vocabulary.
"""

import gzip
import json
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from tinyldm.files import read_json, replacing

START, END = "<|startoftext|>", "<|endoftext|>"
LONGEST_NAMED = 200  # characters of a text that a warning repeats
WORD_END = "</w>"  # closes the last symbol of a piece: "art</w>" ends a word, "art" goes on

# Every byte gets a printable character, so that tokens can be stored as text, one pair to a line.
# Bytes that already are printable Latin-1 keep their own; the others take 256 and up, in order.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
_SYMBOLS = {byte: chr(byte) for byte in _PRINTABLE}
_SYMBOLS |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}
_BYTES = {symbol: byte for byte, symbol in _SYMBOLS.items()}

# Runs over the shape of a text (see below). The special tokens stand here for captions that spell
# them in capitals: they are no special tokens then, but CLIP still cuts them out, in three parts.
_PIECE = re.compile(
    r"(<\|)((?:start|end)oftext)(\|>)|('(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+)", re.ASCII
)


# What Unicode 10 to 18 added to the characters that combine. The normaliser of CLIP's tokenizers in
# transformers knows Unicode 9: it neither reorders nor joins them.
_LEFT_ALONE = re.compile(
    "(["
    "\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715"
    "\u1abf-\u1af0\u1df6-\u1dfa\ua82c\U000105d2\U000105da\U00010d24-\U00010d27"
    "\U00010d69-\U00010d6d\U00010eab\U00010eac\U00010ecb-\U00010ecf\U00010ef0-\U00010efb"
    "\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b"
    "\U000113b8\U000113bb\U000113c2\U000113c9\U000113ce-\U000113d0\U0001145e"
    "\U00011839\U0001183a\U00011930\U0001193d\U0001193e\U00011943\U000119e0\U00011a34"
    "\U00011a47\U00011a99\U00011d42\U00011d44\U00011d45\U00011d97\U00011f41\U00011f42"
    "\U0001611e-\U00016120\U00016129\U0001612f\U00016d67\U00016ff0\U00016ff1"
    "\U0001d127\U0001d128\U0001d250-\U0001d252\U0001d25b\U0001d25c\U0001d25f"
    "\U0001d280\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef"
    "\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee\U0001e6ef"
    "\U0001e6f5"
    "])"
)  # fmt: skip


def _shape(char):
    """Return the ASCII stand-in of a character, so that an ASCII pattern splits any script.

    `z`, `0` and `.` occur in none of the words that `_PIECE` spells out.
    """
    if char.isascii():
        return char
    kind = unicodedata.category(char)[0]
    return "z" if kind == "L" else "0" if kind == "N" else " " if char.isspace() else "."


def _pieces(text):
    """Normalise `text` (NFC, lower case) and split it; white space only separates."""
    # One character at a time: str.lower() would turn a sigma that ends a word into its final form.
    parts = _LEFT_ALONE.split(text)
    parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
    text = "".join(char.lower() for char in "".join(parts))
    matches = _PIECE.finditer("".join(map(_shape, text)))
    spans = (match.span(group) for match in matches for group in range(1, 5))
    return [text[start:stop] for start, stop in spans if start >= 0]


def _symbols(piece):
    symbols = [_SYMBOLS[byte] for byte in piece.encode("utf-8")]
    symbols[-1] += WORD_END
    return symbols


def _merge(symbols, ranks):
    """Join neighbours, the pair learned first before any other, until no learned pair is left."""
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        # `min` returns the first of equals: the leftmost occurrence is joined first.
        at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[at] not in ranks:
            break
        symbols = [*symbols[:at], "".join(pairs[at]), *symbols[at + 2 :]]
    return symbols


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

    Attributes:
        start_id, end_id, pad_id: ids of the start, end and padding token. The end token also
            stands for a byte that `vocab` lacks.

    Raises:
        ValueError: the ids leave gaps, a special token or a merge is not in `vocab`, or a row
            has no room for the start and end token.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        max_length: int = 77,
        pad_token: str = END,
    ):
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"vocab: the ids must be 0 .. {len(vocab) - 1}, each once")
        for token in (START, END, pad_token):
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
        self.max_length, self.pad_token = max_length, pad_token
        self.start_id, self.end_id, self.pad_id = vocab[START], vocab[END], vocab[pad_token]
        self._tokens = sorted(vocab, key=vocab.__getitem__)
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        special = sorted((START, END, pad_token), key=len, reverse=True)  # the longest match wins
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})")
        self._ids_of_piece = {}

    def __len__(self) -> int:
        return len(self.vocab)

    @property
    def content(self) -> dict:
        """Return the constructor's arguments, from which it can be rebuilt."""
        names = ("vocab", "merges", "max_length", "pad_token")
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
            for piece in _pieces(part):
                if piece not in self._ids_of_piece:  # captions repeat their words: merge each once
                    tokens = _merge(_symbols(piece), self._ranks)
                    self._ids_of_piece[piece] = [self.vocab.get(t, self.end_id) for t in tokens]
                ids += self._ids_of_piece[piece]
        return ids

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
                data += bytes(_BYTES[symbol] for symbol in token.removesuffix(WORD_END))
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
        times = Counter(piece for text in texts for piece in _pieces(text))
        words = {piece: _symbols(piece) for piece in times}
        tally = Counter()  # pair -> how often it occurs
        homes = defaultdict(set)  # pair -> the words that have had it: no others need a revisit

        def count(word, sign):
            for pair in pairwise(words[word]):
                tally[pair] += sign * times[word]
                homes[pair].add(word)

        for word in words:
            count(word, +1)
        tokens = [*_SYMBOLS.values(), *(symbol + WORD_END for symbol in _SYMBOLS.values())]
        vocab, merges = {token: i for i, token in enumerate(tokens)}, []
        while len(vocab) < vocab_size - 2 and (most := max(tally.values(), default=0)) > 1:
            best = min(pair for pair, number in tally.items() if number == most)
            merges.append(best)
            vocab["".join(best)] = len(vocab)
            for word in homes.pop(best):
                count(word, -1)
                words[word] = _merge(words[word], {best: 0})
                count(word, +1)
        vocab |= {START: len(vocab), END: len(vocab) + 1}
        return cls(vocab, merges, max_length)

    @classmethod
    def clip(cls, pad_token: str = END) -> Self:
        """Load CLIP's own tokenizer of 49,408 tokens, Stable Diffusion's (Radford et al. 2021)."""
        file = Path(__file__).with_name("clip_merges.txt.gz")
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines]
        symbols = [*_SYMBOLS.values()]
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
                lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
                merges = lines[1:] if lines and lines[0].startswith("#version") else lines
            else:
                model = read_json(folder / "tokenizer.json").get("model", {})
                vocab, merges = model.get("vocab", {}), model.get("merges", [])
            merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]

            config = {}
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                if name in names and "added_tokens_decoder" not in config:  # else the map is old
                    config |= read_json(folder / name)
            max_length = config.get("model_max_length")
            if not isinstance(max_length, int) or max_length > 1_000_000:  # a huge one: "no limit"
                max_length = 77
            pad = config.get("pad_token") or END
            pad = pad.get("content") if isinstance(pad, dict) else pad
            return cls(vocab, merges, max_length, pad)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: not the files of one CLIP tokenizer ({error}); fetch them again"
            ) from error

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
        merges = ["#version: 0.2", *map(" ".join, self.merges)]
        files = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(merges) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, text in files.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
