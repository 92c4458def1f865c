"""What is refused unread: no checkpoint of these systems comes near, files made to harm go beyond."""

# Of the part of a file that says what is in it; JSON in memory takes about ten times its size.
HEADER_BYTES = 16 << 20
# Tensors, and whatever else has a name; a VOLO-D5 has 500.
NAMES = 20_000
NAME_LENGTH = 1_000
# How deeply mappings in a file, and JSON, may nest.
DEPTH = 64
# No axis and no tensor is longer; sums stay far below what overflows.
NUMBERS = 1 << 48
# Of one pickle, without the numbers that lie beside it.
PICKLE_BYTES = 64 << 20
# What unpacks to more than this must not do so by more than that.
UNPACKED_BYTES = 64 << 20
UNPACKED_RATIO = 64
