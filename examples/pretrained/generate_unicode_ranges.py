#!/usr/bin/python3
"""Rewrites unicode_ranges.hpp beside it from Python's Unicode tables."""

import sys
import unicodedata
from pathlib import Path

HEADER = f"""\
#ifndef DYLORA_EXAMPLES_PRETRAINED_UNICODE_RANGES_HPP
#define DYLORA_EXAMPLES_PRETRAINED_UNICODE_RANGES_HPP

// Written by generate_unicode_ranges.py: run that, do not edit this.

namespace pretrained {{

inline constexpr const char* unicode_version = "{unicodedata.unidata_version}";

/// Both ends are in it.
struct CodePointRange {{
  char32_t first, last;
}};

// clang-format off
"""

FOOTER = """\
// clang-format on

}  // namespace pretrained

#endif
"""


def general_category(letter):
    return lambda c: unicodedata.category(chr(c))[0] == letter


def white_space(c):
    """The property White_Space: all separators, and those controls that are laid out as one."""
    return general_category("Z")(c) or 0x09 <= c <= 0x0D or c == 0x85


def ranges(contains):
    result = []
    for c in filter(contains, range(sys.maxunicode + 1)):
        if result and result[-1][1] == c - 1:
            result[-1][1] = c
        else:
            result.append([c, c])
    return result


def table(name, comment, contains):
    lines = [f"/// {comment}", f"inline constexpr CodePointRange {name}[] = {{"]
    line = " "
    for first, last in ranges(contains):
        entry = f" {{0x{first:X}, 0x{last:X}}},"
        if len(line + entry) > 140:
            lines.append(line)
            line = " "
        line += entry
    return "\n".join([*lines, line, "};\n"])


tables = (
    table("letter_ranges", "General category L.", general_category("L")),
    table("number_ranges", "General category N.", general_category("N")),
    table("space_ranges", "The property White_Space.", white_space),
)
Path(__file__).with_name("unicode_ranges.hpp").write_text(HEADER + "\n".join(tables) + FOOTER)
