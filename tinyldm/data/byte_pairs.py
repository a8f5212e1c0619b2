"""Byte-pair encoding of text: normalise, split into pieces, join the symbols of a piece."""

import heapq
import re
import unicodedata
from itertools import pairwise

WORD_END = "</w>"  # closes the last symbol of a piece: "art</w>" ends a word, "art" goes on

# Every byte gets a printable character, so that tokens can be stored as text, one pair to a line.
# Bytes that already are printable Latin-1 keep their own; the others take 256 and up, in order.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
SYMBOLS = {byte: chr(byte) for byte in _PRINTABLE}
SYMBOLS |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}

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


def normalised(text: str) -> str:
    """Bring text to NFC and lower case."""
    # One character at a time: str.lower() would turn a sigma that ends a word into its final form.
    parts = _LEFT_ALONE.split(text)
    parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
    return "".join(char.lower() for char in "".join(parts))


def pieces(text: str) -> list[str]:
    """Split normalised text; white space only separates."""
    matches = _PIECE.finditer("".join(map(_shape, text)))
    spans = (match.span(group) for match in matches for group in range(1, 5))
    return [text[start:stop] for start, stop in spans if start >= 0]


def symbols_of(piece: str) -> list[str]:
    """Return the symbols of a piece's UTF-8 bytes; the last one says that the piece ends."""
    symbols = [SYMBOLS[byte] for byte in piece.encode("utf-8")]
    symbols[-1] += WORD_END
    return symbols


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join neighbours, the pair learned first before any other, until no learned pair is left.

    Of equals the leftmost is joined first. A heap has the pairs: n symbols take n log n steps.
    """
    symbols, n = list(symbols), len(symbols)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    pairs = enumerate(pairwise(symbols))
    heap = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if symbols[i] is None or j == n or ranks.get((symbols[i], symbols[j])) != rank:
            continue  # one of the two has been joined to another since
        symbols[i], symbols[j] = symbols[i] + symbols[j], None
        after[i] = after[j]
        if after[i] < n:
            before[after[i]] = i
        for left in (before[i], i):
            if left >= 0 and after[left] < n:
                pair = symbols[left], symbols[after[left]]
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], left))
    return [symbol for symbol in symbols if symbol is not None]
