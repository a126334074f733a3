"""tokenizer/: a byte-pair vocabulary trained on a page of text, and what GPT-2's way to use it makes of many texts.

vocab.json and merges.txt are as GPT-2's files are; cases.json has, for each text, the bytes of its pre-tokens and its ids."""

import json
import random
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent / "tokenizer"
MERGES = 400

TRAINING_TEXT = '''\
The lighthouse keeper's daughter didn't believe in ghosts, but she'd learned to listen. On the nights when the wind came from the north,
the old tower would hum; and the humming, she'd say, wasn't the wind's. "It's the stairs," her father told her. "There are 214 of them,
and they're older than the light." She counted them again and again: 212, 213, 214. They'll never be 215, she thought, and I've nothing
better to do than to count.

In the spring of 1908 the keeper bought a clock. It was the first thing in the house that had not been there before them, and the daughter
wound it every morning at 7:30, before the lamp was put out, and every evening at 19:30, before it was lit. "We've been keeping the time of
the sun," she wrote to her brother, "and now the sun will have to keep ours." He answered that he'd rather not be told; the harbour's time
was 4 minutes and 20 seconds behind the clock's, and nobody there would wait for the light to be right. I'm sure that there's a reason
for that. Don't you think so?

Nobody came to the house in winter. The path along the cliff was under water from November to the end of March, and the boat that brought
their bread, their oil and their letters came only when the sea would let it. So they had learned to do without: without bread, which she
baked herself; without letters, which she wrote to herself; and, through one long night in February, without oil. That night there was no
light, and that night nobody needed it, or so they were told in the morning. She never believed that. She had heard something in the dark,
between one wave and the next one, that was not the wind's, nor the sea's, nor the tower's, and in the morning there were 215 stairs.
"You've counted one of them twice," said her father. "I haven't," said the daughter. They went up together, counting, and the clock struck
8 as they reached the lamp: 215. They went down together, counting: 214. "One of them," she told him, "we only climb."

    def tokens(self, text, limit=None):
        """Return the tokens of the text, at most limit of them."""
        result = []
        for token in self.split(text):
            if limit is not None and len(result) == limit:
                break
            result.append(self.vocabulary[token])
        return result

    def size(self):
        """Return the number of tokens in the vocabulary."""
        return len(self.vocabulary)

    template <class Iterator>
    Iterator find_first(Iterator first, Iterator last, int value) {
      for (; first != last; ++first) {
        if (*first == value) return first;  // the first of them
      }
      return last;
    }

\t<ul>\r\n\t\t<li>first</li>\r\n\t\t<li>second</li>\r\n\t</ul>\r\n\r\n

Der Wärter erzählte später, daß die Straße für größere Wagen gesperrt würde; die Bürger hätten sich darüber gefreut. L'été dernier, la mère
préférée de l'élève était à l'hôpital, où elle a été très bien soignée. Ο φάρος της θάλασσας φωτίζει τον δρόμο των καραβιών, και ο φύλακας
της θάλασσας δεν κοιμάται. Смотритель маяка каждое утро заводил часы, и каждое утро часы показывали другое время. 灯台の番人は毎朝時計を
巻いた。時計は毎朝違う時刻を示した。 مرحبا بكم في المنارة، مرحبا بالبحر. 🙂 🙂👍 👍🏽 — “the light…” — ‘the light’
'''

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    # contractions: only these seven, only in lower case, only with the straight apostrophe
    "she's it's don't they're we've I'm he'll I'd",
    "SHE'S IT'S DON'T THEY'RE WE'VE I'M HE'LL I'D",
    "He'LL it'S I'Ve we'rE 'Tis 'tis 'twas",
    "'s't're've'm'll'd",
    "'st 'tt 'rere 'vex 'lll 'l 'r 'v 'dd 'md ''s '''s' '",
    " 's 't 're 've 'm 'll 'd",
    "  's\n't\t're",
    "rock 'n' roll, the '90s, o'clock, y'all'd've, d'être, l’été, she’s",
    "'", "''", " '", "' ", "'\n's",
    # white space: the last blank of a run goes with what follows, if it is U+0020; at the end of a text the run stays whole
    "  two", "   three", "a  b", "a   b    c", "end ", "end  ", "end \n", "end\n\n\n", " \n ", "\n", "\n\n", "\t", "\t\t", "\t \t",
    "\ttab", "\t\ttabs", "a\tb", "a\t\tb", "a \tb", "a\t b", "a\n b", "a \nb", "a\n\nb", "a\n \n b", "  \n  x",
    "line\r\nline\r\n", "line\r\n\r\nline", "\r\r\n\n", "a\x0bb\x0cc\x0b\x0cd", "def f(x):\n    return x\n\n\n    # done\n",
    "if x:\n\tif y:\n\t\tpass\n", "x" + " " * 40 + "y" + " " * 40,
    "a\u00a0b", "a \u00a0b", "a\u00a0 b", "a\u00a0\u00a0b", "\u00a0", "\u00a0\u00a0x", "10\u202f000\u00a0€",
    "a\u3000b", "\u3000\u3000全角", "a\u3000 b\u3000", "a\u0085b", "a\u0085\u0085 b", "x\u2028y\u2029z", "\u2003\u2003em",
    "\u1680\u2000\u200a\u205f\u202f",
    # no white space, though some of it looks so
    "zero\u200bwidth", "joi\u200dner non\u200cjoiner", "\ufeffmark", "a \u2060b", "a\u180eb", "a\x1cb\x1d c\x1e\x1f", "a\x00b\x7f",
    "so\u00adft", "\u2800braille\u2800", "ab\u3164c",
    # letters: composed, or with marks, which are no letters
    "café naïve Ångström façade", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "e\u0301\u0302\u0303", " \u0301a", "\u0301",
    "ß ẞ ﬁ ﬂ ŉ ǆ ª º µ", "Ο φάρος της θάλασσας, Ἀθῆναι.", "Смотритель маяка — ещё «часы».", "Ѐ҃ ԱՎ ყველა", "יוֹם טוֹב",
    "灯台の番人は毎朝、時計を巻いた。", "カタカナ ｶﾀｶﾅ ー々〆", "한국어 한글", "مرحبا بكم في المنارة، ١٢٣", "مُحَمَّد", "नमस्ते दुनिया, क्षत्रिय १२३",
    "สวัสดีชาวโลก ๑๒๓", "தமிழ் ಕನ್ನಡ മലയാളം", "ᚠᚢᚦ ᐃᓄᒃᑎᑐᑦ ⴰⵎⴰⵣⵉⵖ ꙮ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐌰𐌱 𠀀𠀁 𒀀",
    # numbers: digits, fractions, numerals
    "0123456789", "1234 5678", "3.14159", "1,234,567.89", "x2 2x x 2 x", "½ ¼ ⅓ 1½", "x² + y³ = z⁴", "H₂O", "Ⅷ ⅷ Ⅻ", "٣ ٣٤ ৪ ४",
    "①②③ ㉛ ㊿", "〇一二三", "𝟘𝟙𝟚 𐄇", "١abc٢", "４２",
    # signs
    "!!!???", "a+b=c", "(a)[b]{c}<d>", "$5.00 €5 £5 ¥5 ₹5", "http://example.org/?q=1&r=%20#top", "<|endoftext|>", "a<|endoftext|> b",
    "…—–‘’“”", " - -- --- ", "→ ⇒ ∀x∈ℝ ∑ √2", "©®™ §¶†", "^_`|~\\/@#%&*", "a_b __init__ snake_case_2", "░▒▓█",
    # emoji: joined, with skin tones, flags, keycaps
    "🙂", " 🙂", "🙂🙂 👍", "👍🏽 👩🏿\u200d🚀", "👨\u200d👩\u200d👧\u200d👦", "🇬🇷🇩🇪 🇯🇵", "1️⃣ #️⃣", "❤️ ❤",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "a🙂b 🙂c",
    # unassigned and private code points, noncharacters
    "\ue000\uf8ff", "\u0378x", "\ufffd \ufffe\uffff", "\U0010ffff\U000e0000", "a\U00050000 1",
    "".join(map(chr, range(128))),
    "".join(map(chr, range(127, -1, -1))),
    "".join(map(chr, range(128, 384))),
]  # fmt: skip

NOT_UTF8 = [
    "80", "bf", "c0", "c1", "c3", "e2", "e282", "f0", "f09f", "f09f99", "f5", "ff", "fe", "20ff", "ff20", "61ff62", "20c320", "2780",
    "20e28220", "c080", "c1bf", "e08080", "e09fbf", "eda080", "edbfbf", "f0808080", "f08fbfbf", "f4908080", "f7bfbfbf", "f888808080",
    "c3a9c3", "e282ac82ac", "ed9fbfee8080", "f48fbfbff490", "e3808020e380", "c2a0c2", "61c2c2a062", "3180c2b2c2",
    bytes(range(256)).hex(), bytes(reversed(range(256))).hex(),
]  # fmt: skip

FRAGMENTS = [
    "a", "The", "é", "φ", "灯", "٣", "7", "½", " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u0085", "\u200b", "\u0301", "'", "'s",
    "'ll", "'S", ".", "--", "🙂", "\u200d", "\x1c", "_",
]  # fmt: skip


def character_class(contains):
    """For a regular expression."""
    members = [c for c in range(sys.maxunicode + 1) if contains(chr(c))]
    firsts = sorted(set(members) - {c + 1 for c in members})
    lasts = sorted(set(members) - {c - 1 for c in members})
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in zip(firsts, lasts)), [len(members), sum(members)]


def is_white_space(c):
    return c.isspace() and c not in "\x1c\x1d\x1e\x1f"  # these four separate paragraphs where text runs both ways, but are no White_Space


(L, letters), (N, numbers), (S, spaces) = map(
    character_class, (lambda c: unicodedata.category(c).startswith("L"), lambda c: unicodedata.category(c).startswith("N"), is_white_space))
PRE_TOKEN = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+")


def pre_tokens(text):
    """Of bytes; those that are not UTF-8 become surrogates here, one each, which are neither letter, number nor space."""
    pieces = [piece.encode("utf-8", "surrogateescape") for piece in PRE_TOKEN.findall(text.decode("utf-8", "surrogateescape"))]
    assert b"".join(pieces) == text
    return pieces


def merged(symbols, pair):
    """With the pair made one wherever it is, from left to right."""
    result, i = [], 0
    while i < len(symbols):
        found = tuple(symbols[i : i + 2]) == pair
        result.append(b"".join(pair) if found else symbols[i])
        i += 2 if found else 1
    return result


def train(text):
    words = Counter(pre_tokens(text))
    words = [([bytes([byte]) for byte in word], count) for word, count in words.items()]
    merges = []
    while len(merges) < MERGES:
        counts = Counter()
        for symbols, count in words:
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += count
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        assert counts[best] > 1, f"the training text is too short, with {len(merges)} merges"
        merges.append(best)
        words = [(merged(symbols, best), count) for symbols, count in words]
    return merges


def encode(text, merges, vocabulary):
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ids = []
    for piece in pre_tokens(text):
        symbols = [bytes([byte]) for byte in piece]
        while known := [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]:
            symbols = merged(symbols, min(known, key=ranks.get))
        ids += [vocabulary[symbol] for symbol in symbols]
    return ids


def generate():
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte_order = visible + [byte for byte in range(256) if byte not in visible]
    character = {byte: chr(byte if byte in visible else 256 + i - len(visible)) for i, byte in enumerate(byte_order)}

    def written(token):
        return "".join(character[byte] for byte in token)

    merges = train(TRAINING_TEXT.encode())
    tokens = [bytes([byte]) for byte in byte_order]
    for left, right in merges:
        if left + right not in tokens:  # two pairs may make the same
            tokens.append(left + right)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    keys = [*map(written, tokens), "<|endoftext|>"]

    rng = random.Random(1)
    mixed = ["".join(rng.choice(FRAGMENTS) for _ in range(12)) for _ in range(100)]
    cases = []
    for text in [*TEXTS, *mixed, *map(bytes.fromhex, NOT_UTF8)]:
        source = {"hex": text.hex()} if isinstance(text, bytes) else {"text": text}
        content = text if isinstance(text, bytes) else text.encode()
        cases.append({**source, "lengths": [len(piece) for piece in pre_tokens(content)], "ids": encode(content, merges, vocabulary)})

    FOLDER.mkdir(exist_ok=True)
    lines = [f"{json.dumps(key)}: {i}" for i, key in enumerate(keys)]
    (FOLDER / "vocab.json").write_text("{" + ",\n".join(lines) + "}\n")
    lines = ["#version: 0.2", *(f"{written(left)} {written(right)}" for left, right in merges)]
    (FOLDER / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # How many code points there are of each kind, and their sum.
    kinds = {"unicode": unicodedata.unidata_version, "letters": letters, "numbers": numbers, "spaces": spaces}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kinds.items()]
    lines.append('"cases": [\n' + ",\n".join(map(json.dumps, cases)) + "]")
    (FOLDER / "cases.json").write_text("{" + ",\n".join(lines) + "}\n")
