"""Size limits for untrusted files; real checkpoints stay far below them."""

# Bytes of a header; parsed JSON takes about ten times as much memory.
HEADER_BYTES = 16 << 20
# Tensors and other named values in a file, of which a VOLO-D5 has 500; characters of a name.
NAMES = 20_000
NAME_LENGTH = 1_000
# Nesting depth of mappings.
DEPTH = 64
# Numbers in a tensor and along an axis, so that sums cannot overflow 64 bits.
NUMBERS = 1 << 48
# Bytes of a pickle, without the tensors stored beside it.
PICKLE_BYTES = 64 << 20
# Files that unpack to more than these bytes must not grow by more than this ratio.
UNPACKED_BYTES = 64 << 20
UNPACKED_RATIO = 64
