"""Message types, records and groups of state of FLASH."""

TRAIN = "train.local"
WARMUP = "train.warmup"

COUNTS = "counts"  # weights of each layer that a mask keeps after the first stage
MASK = "mask"
UPDATE = "update"

HELD = "mask"  # group of a client's state: the mask that it holds
