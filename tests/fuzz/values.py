"""Values that have broken programs like this one: numbers at their edges, texts that mean something elsewhere."""

import random
import string

EDGES = (0, 1, 2, 7, 8, 15, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
WIDE_EDGES = (*EDGES, 2**32, 2**52, 2**53 + 1, 2**62, 2**63 - 1)
UNSIGNED_EDGES = (*WIDE_EDGES, 2**63, 2**64 - 8, 2**64 - 1)

TEXTS = (
    "",
    " ",
    "0",
    "-1",
    "٣",
    "1e309",
    "NaN",
    "a\x00b",
    "\n",
    "line one\nline two",
    "a\r\nHost: elsewhere",
    "\x1b[31mred",
    "\u202eright to left",
    "\u00e9",
    "e\u0301",
    "漢字の重み",
    "\U0001f600",
    "\ufeffbom",
    "'",
    '"',
    "\\",
    "'); import os #",
    '"}, "load_format": "direct", "x": {"',
    "%s%n%d",
    "{0.__class__}",
    "${HOME}",
    "$(reboot)",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/shm/../../etc/shadow",
    "/../x",
    "/.",
    "/..",
    "/torch_1",
    "//",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "model.*",
    "*" * 40 + "b",
    "[z-a]",
    "[[a]",
    "[!",
    "(?P<g0>.*)+$",
    "cos\nsystem\n(S'true'\ntR.",
    "c__builtin__\neval\n",
    "\x80\x03cos\nsystem\nq\x00.",
    "ctorch\nload\n",
    ").\x93",
    "sglang-weight-sync replay 1\n",
    'sglang-weight-sync replay 1\n{"ask":"load"}',
    "GPU-00000000-0000-0000-0000-000000000000",
    "default",
    "None",
    "null",
    "true",
)
ALPHABETS = (
    string.ascii_letters + "._-0123456789",
    string.digits,
    string.printable,
    "\u6f22\u5b57\u00e9\U0001f600\U0001d54f",
    "\x00\n\r\t\x7f\x1b\u2028\u202e",
    "*?[]!a.",
)
LENGTHS = (1, 2, 8, 32, 127, 128, 129, 512, 1023, 1024, 1025)
LONG_LENGTHS = (4096, 65535, 65536)
BLOB_LENGTHS = (0, 1, 2, 26, 30, 34, 63, 64, 65, 66, 67, 128, 4096)


class Values:
    """Draws from one generator of random numbers."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def unsigned(self, bits: int) -> int:
        """A number of that many bits, most often at an edge."""
        if self._rng.random() < 0.2:
            return self._rng.getrandbits(bits)
        return self._rng.choice(UNSIGNED_EDGES) & ((1 << bits) - 1)

    def signed(self, bits: int) -> int:
        """The same with a sign."""
        number = self.unsigned(bits)
        return number - (1 << bits) if number >= 1 << (bits - 1) else number

    def text(self) -> str:
        """A text that protobuf can carry; seldom a long one."""
        rng = self._rng
        if rng.random() < 0.6:
            return rng.choice(TEXTS)
        length = rng.choice(LONG_LENGTHS) if rng.random() < 0.02 else rng.choice(LENGTHS)
        return "".join(rng.choices(rng.choice(ALPHABETS), k=length))

    def blob(self) -> bytes:
        """Bytes, often of a length that matters to CUDA's handles."""
        length = self._rng.choice(BLOB_LENGTHS)
        return self._rng.randbytes(length)

    def length(self) -> int:
        """How many times something is repeated; seldom many."""
        rng = self._rng
        if rng.random() < 0.02:
            return rng.choice((1000, 3000))
        return rng.choice((0, 1, 2, 3, 7, 16, 65, 129))
